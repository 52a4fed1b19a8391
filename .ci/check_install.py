"""What a bare installation must be: the library alone, light, quick to import, and no device touched on import."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import time

for name in ("tensorflow", "torch", "sklearn", "tensorflow_datasets"):
    assert importlib.util.find_spec(name) is None, f"the core brings {name}"

files = importlib.metadata.files("fedjax_clip") or []
rooms = {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info")}
assert rooms == {"fedjax_clip"}, f"the wheel installs {sorted(rooms)}, and must install nothing but fedjax_clip"
assert any(file.name == "py.typed" for file in files), "the wheel lacks py.typed, so that its types are not seen"

subprocess.run([sys.executable, "-c", "import fedjax_clip"], check=True)  # compiles the bytecode
began = time.perf_counter()
subprocess.run([sys.executable, "-c", "import fedjax_clip"], check=True)
seconds = time.perf_counter() - began

from jax._src import xla_bridge  # noqa: E402 (what was imported by then is what is looked at)

import fedjax_clip as fc  # noqa: E402 (its import has just been timed)

assert not xla_bridge._backends, "importing fedjax_clip starts a device"
assert fc.__version__ == importlib.metadata.version("fedjax_clip")
print(f"core installation: import in {seconds:.2f} s, no device touched")
