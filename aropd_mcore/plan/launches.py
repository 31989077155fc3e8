"""Time of a decoded token that does not depend on the number of rows: launches and latencies."""

from aropd_mcore.plan.rates import Rates
from aropd_mcore.plan.setup import Setup


def launch_seconds(setup: Setup, rates: Rates) -> float:
    """Return the seconds in which a token's kernels are launched, in all layers.

    Experts add the routing of a layer, and the products of each expert on the rank.
    """
    per_layer = rates.launch_seconds
    if setup.captures_decoding:
        per_layer = rates.captured_launch_seconds
    routing = setup.architecture.routing
    if routing:
        per_layer += rates.router_launch_seconds
        per_layer += routing.num_experts / setup.expert * rates.expert_launch_seconds
    return setup.architecture.num_layers * per_layer


def exchange_seconds(setup: Setup, rates: Rates) -> float:
    """Return the seconds of a token's exchanges between ranks.

    These are two all-reduces of a layer with tensor ranks, two all-to-alls with expert ranks, a
    gather and a scatter if tensor ranks share an expert, and one send per stage.
    """
    ranks = setup.tensor, setup.expert, setup.expert_tensor
    per_layer = 2 * sum(size > 1 for size in ranks[: 3 if setup.architecture.routing else 1])
    sends = setup.pipeline if setup.pipeline > 1 else 0
    return (setup.architecture.num_layers * per_layer + sends) * rates.collective_seconds
