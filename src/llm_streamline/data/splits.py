"""Which role a document plays. Decided by its hash alone, so the roles' texts are disjoint whatever is asked for.

The shares are fixed and generous to the small roles: a run needs few calibration and validation tokens next to its
training tokens, but a small text must still give every role something. They never depend on a budget: the same
document has the same role in every run, and measuring today cannot leak into evaluating tomorrow.
"""

from types import MappingProxyType

SHARES = MappingProxyType({"evaluation": 0.10, "validation": 0.10, "calibration": 0.15, "train": 0.65})
ROLES = tuple(SHARES)
SEEDED_ROLES = ("calibration", "train")  # the others take the same documents whatever the seed: runs stay comparable


def role_of(document_hash: str) -> str:
    """The role of a document.

    Args:
        document_hash: sha256 in hex; its first 64 bits, read as a fraction, fall into one role's part of [0, 1).
    """
    fraction = int(document_hash[:16], 16) / 2**64
    for role, share in SHARES.items():
        if fraction < share:
            return role
        fraction -= share
    return ROLES[-1]  # the shares' sum, rounded, may be a hair below 1
