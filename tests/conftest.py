"""The tests run on one host device, except those in tests/devices, which test_devices.py starts with eight."""

import os

import jax

DEVICES = int(os.environ.get("FEDJAX_CLIP_TEST_DEVICES", "1"))
jax.config.update("jax_num_cpu_devices", DEVICES)
collect_ignore = [] if DEVICES > 1 else ["devices"]
