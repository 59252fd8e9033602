"""``gas-engine VERB ...`` is ``python -m gas_engine.VERB ...``."""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "train": "learn a few-step solver",
    "sample": "draw samples with a classical or a learned solver",
    "teacher": "write a set of teacher samples",
    "evaluate": "measure solvers: distances to the teacher, FID and its kin, spectra",
    "report": "show runs on one page: what was learned, samples, tables, memory",
    "convert": "write solvers for diffusers, ComfyUI, the Hub; read published files",
    "plan": "find what fits into a number of bytes, without weights or GPU",
    "doctor": "show what is built, found and missing",
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("usage: gas-engine VERB [options]\n")
        print("\n".join(f"  {name:<9} {purpose}" for name, purpose in VERBS.items()))
        return
    if verb not in VERBS:
        print(f"gas-engine: unknown verb {verb!r}; known: {', '.join(VERBS)}", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(importlib.import_module(f"gas_engine.{verb}").main(sys.argv[2:]))


if __name__ == "__main__":
    main()
