"""Batches that were drawn, kept so that a run that was stopped goes on after them."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # a batch, as it is kept


class Ledger:
    """Records of batches by number, kept in a file of JSON lines, the first of which tells what the run depends on."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.records = path, {}
        head = json.dumps(key, sort_keys=True)
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and lines[0] == head:
            self.records: dict[int, Record] = {r["batch"]: r for r in _whole(lines[1:])}
        # written anew: a killed run may have left half a line
        kept = [head, *(json.dumps(r) for r in self.records.values())]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def add(self, record: Record) -> None:
        self.records[record["batch"]] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _whole(lines: list[str]) -> list[Record]:
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
