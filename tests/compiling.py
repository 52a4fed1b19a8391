"""How the tests compile: XLA over small programs is most of their time, so it does not optimise them.

Laws to the last bit between two programs do (``OPTIMIZED``): which products are fused with a sum is the optimiser's.
"""

import importlib.metadata
import os

OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones stop at a flag that they do not know
    OPTIMIZED |= {"xla_cpu_use_fusion_emitters": True}
    QUICK |= {"xla_cpu_use_fusion_emitters": False}


def compile_quickly():
    """To be called before JAX compiles anything; processes that tests start do the same.

    FEDJAX_CLIP_TEST_XLA=optimized tests the programs that users run, all of them.
    """
    if os.environ.get("FEDJAX_CLIP_TEST_XLA") != "optimized":
        flags = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
        os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
