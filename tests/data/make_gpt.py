"""Writes tests/data/gpt.npz: a trained GPT of 30,721 parameters, and 16 sequences of the text that it was trained on.

    python tests/data/make_gpt.py DIR

DIR holds tinyshakespeare.txt, as for the experiments. The net is the experiments' `gpt` at half its width. After 8
epochs, which take some minutes on two CPU cores, its loss is 1.70 nats per character on the training text and 1.85 on
the rest; the entropy of single characters is 3.31. The file holds the exact losses.
"""

import pathlib
import sys

import numpy as np
from flax.traverse_util import flatten_dict

from experiments import data, models, recipe, train

if __name__ == "__main__":
    text = data.load("shakespeare", sys.argv[1])
    model = models.build("gpt", text.num_classes, width=0.5)
    config = recipe.TrainConfig(epochs=8, batch_size=64, learning_rate=0.1, milestones=(0.75,))
    trained = train.train(model, text, config)
    arrays = {f"params/{name}": np.asarray(x) for name, x in flatten_dict(trained.params, sep="/").items()}
    arrays |= {name: text.train[name][:16].astype(np.uint8) for name in ("image", "label")}
    arrays |= {name: trained.history[name][-1] for name in ("train_loss", "test_loss")}
    np.savez(pathlib.Path(__file__).parent / "gpt.npz", **arrays)
    size = sum(x.size for name, x in arrays.items() if name.startswith("params/"))
    print(f"{size:,} parameters, loss {arrays['train_loss']:.3f} in training, {arrays['test_loss']:.3f} in test")
