"""`import qdora` in any folder, after `pip install -e .` here: then `import kernels, modules` are this folder's.

The folders keep their names, and only a process that imports this sees them: `kernels` is also a package of Hugging
Face's on PyPI, which an installed one would take the place of.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if not (ROOT / "kernels" / "op.py").is_file():
    raise ImportError("qdora works in its own folder: install it there with `pip install -e .`, not as a copy")
if "kernels" in sys.modules and ROOT not in Path(sys.modules["kernels"].__file__).parents:
    raise ImportError("a package `kernels` that is not qdora's is loaded: import qdora first")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
