"""One plain sentence about each strategy that a run file can name."""

from __future__ import annotations

OBJECTIVES = {
    "backprop": "One loss at the end; its gradient is sent backward through all blocks.",
    "cafo": "Blocks are random or have a loss of their own; an output layer of each is fitted.",
    "ccl": "Each block learns codes of the classes, which a feedback network makes.",
    "deep-supervision": "Backpropagation, and each block also has a loss of its own.",
    "dfa": "Each block learns from the error of the last block, through a fixed random matrix.",
    "diffusion-blocks": "Each block removes noise from the label, in its own band of noise.",
    "dni": "Each block learns from a prediction of its gradient, so it does not wait for it.",
    "drtp": "The label chooses a fixed random direction, in which each block is pushed.",
    "dual-propagation": "Gradients flow back; differences take the place of slopes.",
    "f3": "Each block learns from the error one epoch before, through a fixed random matrix.",
    "forward-forward": "Each block learns high activity for right labels and low for wrong ones.",
    "forward-gradient": "Each block learns from derivatives along random directions.",
    "forward-gnn": "Each block compares nodes with a virtual node per class; nothing is sent back.",
    "infopro": "Each block learns to classify and to keep the information of the sample.",
    "layer-collaboration": "As forward-forward, with the activity of all blocks.",
    "lls": "Each block learns to resemble fixed waves, one for each class.",
    "lls-m": "As lls, with a trained factor for each class.",
    "lls-mxm": "As lls, with a trained matrix between classes.",
    "local-head": "Each block has a small network and a loss of its own; no gradient is sent back.",
    "man": "As infopro, behind a moving average of the next layer.",
    "mono-forward": "Each block has a linear output and a loss of its own; nothing is sent back.",
    "noprop": "Each block removes noise from the label, at its own level; nothing is sent.",
    "pepita": "Each block learns from the change of its output when the error changes the input.",
    "pfa": "Gradients flow back through learnt feedback, which does not read the weights.",
    "scalable-ff": "Each block learns high activity in the channels of the true class.",
    "tpsgd": "The label chooses a fixed random target, which the output of each block approaches.",
    "ulr": "Each block learns from the changes of a loss under noise in its activations.",
}


SCHEDULES = {
    "stream": "Outputs flow forward; no stage waits for the backward of another.",
    "stream-replay": "As stream; a rank replays earlier inputs where the next one is late.",
    "fill-drain": "All forwards of an update come first, then all backwards (GPipe).",
    "1f1b": "Each stage alternates between one forward and one backward.",
    "drained": "An update ends on all stages before the next one begins.",
    "pipelined": "Stages do not wait for each other; gradients arrive some updates late.",
    "pipedream": "As 1f1b without a pause between updates; gradients arrive some updates late.",
    "pipedream-2bw": "As pipedream, with two versions of the weights.",
    "features-replay": "As pipedream; a backward computes its forward again with newer weights.",
    "petra": "As pipelined; reversible blocks rebuild their inputs and keep no activations.",
    "interleaved": "As 1f1b, with several smaller blocks per stage, so that stages wait less.",
    "fold": "Blocks go down the stages and back: the first stage holds the last block, too.",
}


SYNCS = {
    "ab": "Groups of replicas train low-rank factors of the weights and merge periodically.",
    "daso": "Nodes average gradients inside in each update, and weights between them less often.",
    "demo": "Only the largest frequency components of the momentum are sent.",
    "diloco": "Replicas train alone; a second optimizer applies the mean of their changes.",
    "every-step": "Gradients are averaged over replicas in every update.",
    "int8": "Gradients are averaged with one byte per number.",
    "local-sgd": "Replicas train alone and average their weights periodically.",
    "never": "Replicas train alone; the mean of their weights is evaluated.",
    "oialr": "Weights become small cores between fixed bases; the cores are averaged.",
    "only-large": "Small tensors are averaged in every update, large ones by another sync.",
    "powersgd": "Gradients are averaged as products of thin matrices.",
    "qsr": "As local-sgd, with a period that grows as the learning rate falls.",
    "terngrad": "Gradients are rounded to three values before they are averaged.",
    "warmup": "Gradients are averaged in every update at first, later by another sync.",
}


MODELS = {
    "cnn": "Convolutions in a row.",
    "lstm": "Recurrent layers over the steps of a sequence.",
    "mlp": "Fully connected layers in a row.",
    "resnet": "Convolutions with shortcuts.",
    "revnet": "Convolutions with two streams, whose units are reversible.",
    "transformer": "Layers of attention over the steps of a sequence.",
    "unet": "Convolutions at resolutions that halve and double again, with skips between them.",
    "vit": "Layers of attention over the patches of an image.",
}


DATASETS = {
    "csv": "Samples from tables of comma-separated values.",
    "digits": "Handwritten digits, 8 × 8 pixels each.",
    "hdf5": "Samples from HDF5 files.",
    "idx": "Images from IDX files.",
    "npz": "Samples from files of numpy.",
    "series": "Windows of a series, and the steps after each.",
    "text": "Windows of a text, and the next token of each of their tokens.",
}


NOTES = {
    "objective": OBJECTIVES,
    "schedule": SCHEDULES,
    "sync": SYNCS,
    "model": MODELS,
    "data": DATASETS,
}
"""The sentences by section of the run file."""


def strategy_note(section: str, name: str) -> str:
    """Return the sentence about a strategy, empty for a user's own."""
    return NOTES[section].get(name, "")
