"""The Tab key, in bash, for `python -m experiments.…`. Hydra's own completes `python FILE` alone, in seconds.

eval "$(python -m experiments.run -sc install=bash)"
"""

import os

from experiments.system.keys import Keys

SCRIPT = """_qdora_complete() {
    local words=($COMP_LINE)
    [[ ${words[1]} == -m && ${words[2]} == experiments.* ]] || return
    COMPREPLY=($(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" "${words[0]}" -m "${words[2]}" -sc query=bash 2> /dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o default -o nospace -F _qdora_complete python python3"""
UNINSTALL = "complete -r python python3; unset -f _qdora_complete"


def answer(keys: Keys, request: str) -> str | int:
    """Print the answer to `install=bash`, `uninstall=bash` or `query=bash`; the argument of sys.exit."""
    if request not in ("install=bash", "uninstall=bash", "query=bash"):
        return f"error: -sc {request}: choose install=bash or uninstall=bash"
    if request == "query=bash":
        line = os.environ.get("COMP_LINE", "")
        print("\n".join(complete(keys, "" if line.endswith(" ") else line.split(" ")[-1])))
    else:
        print(SCRIPT if request == "install=bash" else UNINSTALL)
    return 0


def complete(keys: Keys, word: str) -> list[str]:
    """Every argument that begins with `word`."""
    name = word.partition("=")[0]
    if "=" not in word:
        groups = (f"{'' if group in keys.chosen else '+'}{group}" for group in keys.groups)
        found = [f"{key}=" for key in (*groups, *keys.keys)]
    elif name.lstrip("+") in keys.groups:
        found = [f"{name}={choice}" for choice in keys.groups[name.lstrip("+")]]
    elif name in keys.keys and keys.keys[name].type == "bool":
        found = [f"{name}=true", f"{name}=false"]
    else:
        found = []
    return [one for one in found if one.startswith(word)]
