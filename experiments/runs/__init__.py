"""Runs: how one goes, its files, and many of them together.

The modules by their subject:

    one_run start before measures tracking shared_base  a run, from its configuration to its result
    directory checkpoints model_files output_files config_file    its directory and files
    result_numbers spectrum identity                    the numbers in its files
    finished lm_eval_harness base_and_tuned             trained models, loaded again
    sweep groups ablations                              many runs: made, read and compared
"""
