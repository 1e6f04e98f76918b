"""Groups of MoRI's kernel types that share code. Plain names; nothing is proven by a group."""

INTRA_NODE_TYPES = ("IntraNode", "IntraNodeLL")
NODE_LEVEL_TYPES = ("InterNodeV1", "InterNodeV1LL")
