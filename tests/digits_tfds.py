"""The digits as a TFDS builder: it takes the tests through TFDS without a network."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedjax_clip.data import sources


class FedjaxDigits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's digits with the NIST form that each was written on."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="8x8 handwritten digits (grey levels 0 to 16) from 14 NIST forms.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "client_id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Mapping[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        data = sources.digits()
        pixels = np.round(data.examples["x"] * 16).astype(np.uint8)
        owner = np.repeat(np.arange(data.num_clients), data.sizes)
        for i, (image, label, client) in enumerate(zip(pixels, data.examples["y"], owner, strict=True)):
            yield i, {"image": image, "label": int(label), "client_id": data.name(int(client))}


def build_digits_tfds(data_dir: str | os.PathLike) -> Path:
    """Prepares the digits as the TFDS data set ``fedjax_digits``; its clients and order are those of ``digits()``."""
    builder = FedjaxDigits(data_dir=os.fspath(data_dir), file_format="array_record")
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare()
    return Path(builder.data_dir)
