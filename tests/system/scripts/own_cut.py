"""Section 3 of the contract: cuts by a function, and the stage of every block."""

from my_model import net, run

import dtrain


def by_parameters(layers, blocks):
    """Cut where a share of the parameters is reached."""
    total, seen, cuts = sum(layer.parameters for layer in layers), 0, []
    for layer in layers:
        if len(cuts) < blocks - 1 and seen >= total * (len(cuts) + 1) / blocks:
            cuts.append(layer.name)
        seen += layer.parameters
    return cuts


partition = dtrain.Partition(cuts=by_parameters, blocks=3)
placed = dtrain.Partition(blocks=4, places=[0, 1, 1, 0])

if __name__ == "__main__":
    print(dtrain.plan(run.replace(partition=placed), ranks=2))
    result = dtrain.train(run.replace(partition=partition, epochs=2), out="runs/cut")
    dtrain.train(run.replace(partition=placed, epochs=2), out="runs/places")
    if result.rank == 0:
        net().load_state_dict(result.state_dict())
