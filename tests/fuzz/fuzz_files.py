"""Coverage-guided fuzzing of every reader of foreign files: ``make fuzz`` (five minutes; FUZZ_SECONDS=3600 for longer).

Needs atheris (pip install atheris). An input is a byte that picks the reader, and the file. The corpus is kept in
``build/fuzz``, and so is an input that breaks the promise: a value, or ValueError with one sentence.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["gas_engine._safe_pickle", "gas_engine.adapters", "gas_engine.solvers.files"]):
    import hostile
    import hostile_files

KINDS = sorted(hostile.READERS)


def main() -> None:
    corpus, found = Path("build/fuzz/corpus"), Path("build/fuzz/found")
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        watch = hostile.Watch()
        for index, (kind, content) in enumerate(hostile_files.seeds(Path(folder))):
            (corpus / f"seed-{index}").write_bytes(bytes([KINDS.index(kind)]) + content)
        hostile.warm(Path(folder))

        def one(data: bytes) -> None:
            if data:
                hostile.outcome(KINDS[data[0] % len(KINDS)], data[1:], Path(folder), watch)

        seconds = os.environ.get("FUZZ_SECONDS", "300")
        options = [
            f"-max_total_time={seconds}",
            "-rss_limit_mb=2048",
            "-timeout=30",
            "-max_len=65536",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={found}/", *sys.argv[1:], str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
