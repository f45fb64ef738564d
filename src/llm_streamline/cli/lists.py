"""Commands that list what there is: model families (`architectures`) and ways of choosing layers (`methods`)."""

import sys

from llm_streamline.cli import options as o
from llm_streamline.cli import terminal


def architectures(as_json: o.JsonOption = False) -> None:
    """List the model families of the installed transformers: sound, refused with the reason, or untested."""
    from llm_streamline.architectures import list_architectures, proven_on

    found = list_architectures()
    print(proven_on(), file=sys.stderr)
    if as_json:
        terminal.print_json([{"model_type": f.model_type, "status": f.status, "reason": f.reason} for f in found])
        return
    for one in found:
        print(f"{one.model_type:28} {one.status:9} {one.reason or ''}".rstrip())


def methods(as_json: o.JsonOption = False) -> None:
    """List the methods of choosing layers, with their papers."""
    from llm_streamline.methods.registry import find_method, method_names

    found = [find_method(name) for name in method_names()]
    if as_json:
        terminal.print_json([{"name": m.name, "paper": m.paper, "summary": m.summary} for m in found])
        return
    for one in found:
        print(f"{one.name:12} {one.paper:18} {one.summary}")
