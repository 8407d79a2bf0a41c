"""Writes tests/data/tfds: ten made images in the form of CIFAR-100, as TensorFlow Datasets keeps it.

    pip install tensorflow-cpu tensorflow-datasets importlib_resources array_record
    python tests/data/make.py

Pixel (y, x) of image i, counted through both splits, is (25 i, 8 y, 8 x); its label is 37 i modulo 100.
"""

import pathlib

import numpy as np
import tensorflow_datasets as tfds

SPLITS = {"train": range(6), "test": range(6, 10)}


def example(i):
    y, x = np.mgrid[:32, :32]
    label = 37 * i % 100
    return {
        "image": np.stack([np.full_like(y, 25 * i), 8 * y, 8 * x], axis=-1).astype(np.uint8),
        "label": label,
        "coarse_label": label // 5,
    }


if __name__ == "__main__":
    tfds.dataset_builders.store_as_tfds_dataset(
        name="cifar100",
        version="3.0.2",
        data_dir=pathlib.Path(__file__).parent / "tfds",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(32, 32, 3), dtype=np.uint8, encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=100),
                "coarse_label": tfds.features.ClassLabel(num_classes=20),
            }
        ),
        split_datasets={split: [(i, example(i)) for i in indices] for split, indices in SPLITS.items()},
        file_format="array_record",
        disable_shuffling=True,
        description="Ten made images in the form of CIFAR-100, for tests.",
    )
