"""Data sets of TensorFlow Datasets, read without TensorFlow: a made one in tests/data, and the real ones."""

import pathlib

import numpy as np
import pytest

from experiments import data

MADE = str(pathlib.Path(__file__).parent / "data" / "tfds")  # by tests/data/make.py


@pytest.mark.parametrize(("label", "num_classes", "divisor"), [("label", 100, 1), ("coarse_label", 20, 5)])
def test_images_and_labels_are_read_in_order(label, num_classes, divisor):
    found = data.load("cifar100", MADE, label=label, progress=False)
    i, y, x = np.meshgrid(range(10), range(32), range(32), indexing="ij")
    images = np.concatenate([found.train["image"], found.test["image"]])
    np.testing.assert_array_equal(images, np.stack([25 * i, 8 * y, 8 * x], axis=-1))
    labels = np.concatenate([found.train["label"], found.test["label"]])
    np.testing.assert_array_equal(labels, 37 * np.arange(10) % 100 // divisor)
    assert found.num_classes == num_classes and len(found.train["label"]) == 6
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    np.testing.assert_allclose(found.mean.ravel(), [62.5, 124, 124])


def test_slices_make_one_split(monkeypatch):
    whole = data.load("cifar100", MADE, progress=False)
    monkeypatch.setattr(data, "_SLICE", 4)
    sliced = data.load("cifar100", MADE, progress=False)
    for key, values in whole.train.items():
        np.testing.assert_array_equal(values, sliced.train[key])


def test_labels_of_another_name():
    with pytest.raises(ValueError, match=r"'colour', a class label.*\['coarse_label', 'label'\]"):
        data.load("cifar100", MADE, label="colour")


def test_absent_data_set_names_the_command_and_does_not_download(tmp_path):
    with pytest.raises(
        ValueError, match=rf"'mnist' is not in {tmp_path}.*tfds build mnist --data_dir={tmp_path} --file"
    ):
        data.load("mnist", str(tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="unknown data set 'mnizt'"):
        data.load("mnizt", str(tmp_path))


def test_the_environment_says_where_data_is(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXHESS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"is not in {tmp_path} "):
        data.load("cifar10")


def test_mnist_whole(data_dir):
    mnist = data.load("mnist", data_dir, progress=False)
    assert mnist.train["image"].shape == (60_000, 28, 28, 1) and mnist.test["image"].shape == (10_000, 28, 28, 1)
    assert mnist.num_classes == 10 and mnist.train["image"].dtype == np.uint8
    np.testing.assert_array_equal(mnist.train["label"][:5], [5, 0, 4, 1, 9])  # as published
    assert mnist.mean.item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert mnist.std.item() / 255 == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.slow
def test_cifar_whole(data_dir):
    fine, coarse = (data.load("cifar100", data_dir, label=label, progress=False) for label in ("label", "coarse_label"))
    for found in (fine, coarse):
        assert found.train["image"].shape == (50_000, 32, 32, 3) and found.test["image"].shape == (10_000, 32, 32, 3)
        np.testing.assert_array_equal(np.bincount(found.train["label"]), 50_000 // found.num_classes)
    assert fine.num_classes == 100 and coarse.num_classes == 20
    # As published, to the digits that are.
    np.testing.assert_allclose(fine.mean.ravel() / 255, [0.5071, 0.4865, 0.4409], atol=1e-4)
    np.testing.assert_allclose(fine.std.ravel() / 255, [0.2673, 0.2564, 0.2762], atol=1e-4)
    cifar10 = data.load("cifar10", data_dir, progress=False)
    assert cifar10.num_classes == 10 and cifar10.train["image"].shape == (50_000, 32, 32, 3)
