"""Altered documents, strange requests and kills by the thousand; docs/fuzz.md says what is expected of each."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: nothing here may reach for the network
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"  # threads would not survive a fork
