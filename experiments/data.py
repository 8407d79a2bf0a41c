"""Data on host and device: scikit-learn's digits, image sets of TensorFlow Datasets, and Tiny Shakespeare."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from typing import Annotated, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.scipy.ndimage import map_coordinates
from tqdm import tqdm

from experiments import names

Array = TypeVar("Array")
Split = dict[str, np.ndarray]

# How a data set is typed. Any set of TensorFlow Datasets will do, so the help shows those of the paper.
_SHOWN = tyro.conf.arg(metavar="{digits,mnist,fashion_mnist,cifar10,cifar100,svhn_cropped,shakespeare,...}")
Name = Annotated[str, _SHOWN]
Names = Annotated[tuple[str, ...], _SHOWN]

TEXT, TEXT_FILE, SEQUENCE = "shakespeare", "tinyshakespeare.txt", 32
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

_SLICE = 4096  # images at a time: bounds the memory of decoding, and moves the progress bar


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
      name: its name.
      num_classes: number of classes.
      train: {"image": uint8 (N, H, W, C), "label": int32 (N,)}; of text {"image": int32 (N, T), "label": int32 (N, T)},
        the characters and those that follow them.
      test: likewise.
      mean: float32 (1, 1, 1, C), of every channel over the training images; None of text.
      std: float32 (1, 1, 1, C), likewise.
    """

    name: str
    num_classes: int
    train: Split
    test: Split
    mean: np.ndarray | None
    std: np.ndarray | None

    @property
    def is_text(self) -> bool:
        """Whether an example is a sequence of characters, each with a label: the next one."""
        return self.mean is None

    @classmethod
    def create(cls, name: str, num_classes: int, train: Split, test: Split) -> Dataset:
        """A data set whose mean and standard deviation are computed from its training images."""
        return cls(name, num_classes, train, test, *_moments(train["image"]))

    def batch(self, split: Split) -> Split:
        """A split with normalised float32 images, or characters as they are: a batch as losses take it."""
        return {"image": normalise(split["image"], self.mean, self.std), "label": split["label"]}


def load(name: str, data_dir: str | None = None, *, label: str = "label", progress: bool = True) -> Dataset:
    """Loads a data set whole.

    Args:
      name: "digits" (comes with scikit-learn, enlarged to 28x28); "shakespeare", text in sequences of 32 characters, or
        of so many as stand behind a slash ("shakespeare/256"); or any set of TensorFlow Datasets with the splits train
        and test (or validation), an image of one size and a class label: "mnist", "cifar10", ...
      data_dir: where TensorFlow Datasets keeps its files; by default the environment variable JAXHESS_DATA_DIR, then
        that library's own default. The text is there too, or in the folder ``text`` next to it.
      label: name of the feature with the labels ("coarse_label" for the 20 superclasses of cifar100).
      progress: whether to show a progress bar.

    Returns:
      `Dataset`.

    Raises:
      ValueError: if the set is unknown or not in ``data_dir`` (with the command that brings it), or has no such
        features or splits.
    """
    if name == "digits":
        return _digits()
    if name.partition("/")[0] == TEXT:
        return _text(name, _folder(data_dir))
    return _tfds(name, data_dir or os.environ.get("JAXHESS_DATA_DIR") or None, label, progress)


def check(name: str, data_dir: str | None = None) -> None:
    """ValueError, with the name that was meant, if there is no data set of a name; whether it is prepared is not asked.

    Args:
      name: as for `load`; what stands behind a slash or a colon says which part or label of it.
      data_dir: as for `load`; a set of one's own may be there.
    """
    base = re.split("[/:]", name)[0]
    if base in ("digits", TEXT):
        return
    import tensorflow_datasets as tfds

    if not (base and (_folder(data_dir) / base).is_dir()):
        known = ["digits", TEXT, *tfds.list_builders(with_community_datasets=False)]
        names.check("data set", base, known, words="neither 'digits' nor known to tensorflow-datasets")


def normalise(image: Array, mean: np.ndarray | None, std: np.ndarray | None) -> Array:
    """Images (..., H, W, C) of any type as float32 with zero mean and unit variance a channel; NumPy or JAX.

    What has no mean, as text, is returned as it is.
    """
    if mean is None:
        return image
    return (image.astype(np.float32) - mean) / std


def per_class(split: Split, count: int, num_classes: int) -> Split:
    """The first ``count`` examples of every class, class by class.

    Args:
      split: {"image": (N, ...), "label": int (N,)}.
      count: examples of each class.
      num_classes: number of classes.

    Returns:
      A split of count * num_classes examples.

    Raises:
      ValueError: if ``count`` is below 1, or more than some class has.
    """
    if count < 1:
        raise ValueError(f"at least one example of each class is needed, got count={count}")
    found = [np.flatnonzero(split["label"] == c)[:count] for c in range(num_classes)]
    short = {c: len(index) for c, index in enumerate(found) if len(index) < count}
    if short:
        raise ValueError(f"count={count} is more than these classes have (class: examples): {short}; take fewer")
    return {key: value[np.concatenate(found)] for key, value in split.items()}


def first(dataset: Dataset, count: int) -> Split:
    """The first training examples: ``count`` of every class as `per_class`, or ``count`` sequences of a text.

    Raises:
      ValueError: if ``count`` is below 1, or more than there are.
    """
    if not dataset.is_text:
        return per_class(dataset.train, count, dataset.num_classes)
    total = len(dataset.train["label"])
    if not 1 <= count <= total:
        raise ValueError(f"{dataset.name} has 1 to {total} sequences to take, got count={count}")
    return {key: value[:count] for key, value in dataset.train.items()}


def hold_out(dataset: Dataset, count: int, seed: int = 0) -> Dataset:
    """The same set with a random part of its training images in place of the test images, to choose settings on.

    Of text it is the end, since neighbouring sequences are alike.

    Args:
      dataset: the whole set; its test images are not looked at.
      count: images to hold out, of which each class has its share to within one; of text, sequences.
      seed: of the choice.

    Returns:
      `Dataset`, whose name tells how many were held out.

    Raises:
      ValueError: if ``count`` leaves a class no training image, or is less than one for each class; for text, if it
        leaves no sequence.
    """
    from sklearn.model_selection import train_test_split

    labels = dataset.train["label"]
    if dataset.is_text:
        if not 0 < count < len(labels):
            raise ValueError(f"cannot hold out {count} of {len(labels)} sequences of {dataset.name}; take fewer")
        return _held_out(dataset, np.arange(len(labels) - count), np.arange(len(labels) - count, len(labels)))
    try:
        rest, held = train_test_split(np.arange(len(labels)), test_size=count, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ValueError(f"cannot hold out {count} of {len(labels)} images of {dataset.name}: {error}") from error
    return _held_out(dataset, rest, held)


def _held_out(dataset, rest, held):
    train, test = ({key: value[index] for key, value in dataset.train.items()} for index in (rest, held))
    return dataclasses.replace(dataset, name=f"{dataset.name}/held-out-{len(held)}", train=train, test=test)


class OnDevice(NamedTuple):
    """A split on the device, and what normalises its images."""

    split: dict[str, jax.Array]
    mean: jax.Array | None
    std: jax.Array | None

    def take(self, index: jax.Array) -> dict[str, jax.Array]:
        """The examples of these indices as a batch, images normalised; inside ``jit`` too."""
        batch = jax.tree.map(lambda x: x[index], self.split)
        return batch | {"image": normalise(batch["image"], self.mean, self.std)}


def on_device(dataset: Dataset, split: Split) -> OnDevice:
    """A split of a data set, moved to the device."""
    return jax.device_put(OnDevice(split, dataset.mean, dataset.std))


@jax.jit
def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Every image flipped left to right or not, and rotated by up to 15 degrees, both at random.

    Between pixels it is interpolated linearly; what comes in from outside continues the border.

    Args:
      key: a JAX random key.
      images: (N, H, W, C).

    Returns:
      Images of the same shape and type, within the range of each.
    """
    number, height, width, _ = images.shape
    flip_key, angle_key = jax.random.split(key)
    sides = jax.random.rademacher(flip_key, (number,), jnp.float32)
    angles = jax.random.uniform(angle_key, (number,), minval=-jnp.pi / 12, maxval=jnp.pi / 12)
    middle = ((height - 1) / 2, (width - 1) / 2)
    y, x = jnp.meshgrid(jnp.arange(height) - middle[0], jnp.arange(width) - middle[1], indexing="ij")

    def turn(image, side, angle):
        rows = jnp.cos(angle) * y - jnp.sin(angle) * x + middle[0]
        columns = side * (jnp.sin(angle) * y + jnp.cos(angle) * x) + middle[1]

        def channel(values):
            return map_coordinates(values, (rows, columns), order=1, mode="nearest")

        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(turn)(images, sides, angles)


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Bilinear, as a matrix that acts on rows and on columns: (28, 8).
    centres = (np.arange(28) + 0.5) * (8 / 28) - 0.5
    enlarge = np.stack([np.interp(centres, np.arange(8), unit) for unit in np.eye(8)], axis=1)
    images = np.rint(enlarge @ digits.images @ enlarge.T * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=297, stratify=labels, random_state=0)
    splits = ({"image": images[index], "label": labels[index]} for index in (train, test))
    return Dataset.create("digits", 10, *splits)


def _folder(data_dir):
    """Where data sets are."""
    if found := data_dir or os.environ.get("JAXHESS_DATA_DIR"):
        return pathlib.Path(found)
    import tensorflow_datasets as tfds

    return pathlib.Path(tfds.core.constants.DATA_DIR)


def _text(name, folder):
    """Tiny Shakespeare in sequences that follow each other; the first nine tenths are for training."""
    length = name.partition("/")[2] or str(SEQUENCE)
    if not (length.isdecimal() and int(length) > 0):
        raise ValueError(f"{name!r} must name a number of characters after the slash, as in {TEXT}/{SEQUENCE}")
    places = [folder / TEXT_FILE, folder.parent / "text" / TEXT_FILE]
    if not (path := next((place for place in places if place.is_file()), None)):
        raise ValueError(
            f"the text of {TEXT!r} is neither {places[0]} nor {places[1]}; bring it with `curl --create-dirs -o "
            f"{places[0]} {TEXT_URL}`, or name another folder with data_dir= or JAXHESS_DATA_DIR"
        )
    characters, codes = np.unique(list(path.read_text()), return_inverse=True)
    cut = int(0.9 * len(codes))
    splits = (_sequences(part.astype(np.int32), int(length), name) for part in (codes[:cut], codes[cut:]))
    return Dataset(name, len(characters), *splits, None, None)


def _sequences(codes, length, name):
    count = (len(codes) - 1) // length
    if not count:
        raise ValueError(f"{name!r} asks for sequences of {length} characters, and there are {len(codes)}; take fewer")
    image, label = (codes[start : start + count * length].reshape(count, length) for start in (0, 1))
    return {"image": image, "label": label}


def _tfds(name, data_dir, label, progress):
    import tensorflow_datasets as tfds

    where = str(data_dir or tfds.core.constants.DATA_DIR)
    try:
        # download=False: without it a set that is absent is looked for on the network, for minutes.
        sources = tfds.data_source(name, data_dir=data_dir, download=False)
    except ValueError as error:  # of a name that it cannot make sense of, with a long list of those that it can
        check(name, data_dir)
        raise ValueError(f"unknown data set {name!r}: {error}") from error
    except (AssertionError, NotImplementedError):  # not prepared, or in a format that needs TensorFlow to be read
        sources = {}
    if not sources:
        raise ValueError(
            f"data set {name!r} is not in {where} as array_record; bring it with `pip install tensorflow-cpu` and "
            f"`tfds build {name} --data_dir={where} --file_format=array_record`, or name the folder that has it with "
            f"data_dir= or JAXHESS_DATA_DIR"
        )
    test = "test" if "test" in sources else "validation"
    missing = {"train", test} - set(sources)
    if missing:
        raise ValueError(f"data set {name!r} has no split {sorted(missing)}, only {sorted(sources)}")
    features = sources["train"].dataset_info.features
    classes = sorted(key for key, feature in features.items() if hasattr(feature, "num_classes"))
    if "image" not in features or label not in classes:
        raise ValueError(
            f"data set {name!r} needs the features 'image' and {label!r}, a class label; it has {sorted(features)}, "
            f"of which class labels: {classes}"
        )
    splits = (_read(sources[split], label, f"{name} {split}", progress) for split in ("train", test))
    return Dataset.create(name, features[label].num_classes, *splits)


def _read(source, label, title, progress):
    """One split as stacked arrays, read in whole slices, which is many times faster than one by one."""
    images, labels = [], []
    # disable=None: on terminals only.
    with tqdm(total=len(source), desc=title, unit="img", disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(source), _SLICE):
            examples = source.__getitems__(range(start, min(start + _SLICE, len(source))))
            sizes = {example["image"].shape for example in examples}
            if len(sizes) > 1:
                raise ValueError(f"{title} has images of different sizes, such as {sorted(sizes)[:3]}; one is needed")
            images.append(np.stack([example["image"] for example in examples]))
            labels.extend(example[label] for example in examples)
            bar.update(len(examples))
    return {"image": np.concatenate(images), "label": np.asarray(labels, np.int32)}


def _moments(images):
    """Mean and standard deviation of every channel, each float32 (1, 1, 1, C), in the memory of a slice."""
    first = second = 0.0
    for start in range(0, len(images), _SLICE):
        chunk = images[start : start + _SLICE].astype(np.float64)
        first = first + chunk.sum((0, 1, 2), keepdims=True)
        second = second + (chunk**2).sum((0, 1, 2), keepdims=True)
    count = images[..., 0].size
    mean = first / count
    std = np.sqrt(np.maximum(second / count - mean**2, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
