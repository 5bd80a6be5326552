"""The page that says where the text came from and under which terms."""

from __future__ import annotations

import json
from pathlib import Path

from stateferry.bundled.recipe.sources import SOURCES

INTRODUCTION = """# Text the model was trained on

Every entry is text distributed by a Debian 12 package, or by a PyPI source distribution where
marked. Bytes are UTF-8 after cleaning, removal of repeated paragraphs, and removal of training
paragraphs that share word runs with held-out documents. "Weight" is the number of passes over the
source per training epoch. No text is shipped with the model except `heldout_sample.txt`, which
holds public domain and Apache-2.0 documents only.

| source | package, version | licence | text by | training bytes | held-out bytes | weight |
| --- | --- | --- | --- | ---: | ---: | ---: |
"""
WORDNET = """
## WordNet

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.

This software and database is being provided to you, the LICENSEE, by Princeton University under
the following license. By obtaining, using and/or copying this software and database, you agree
that you have read, understood, and will comply with these terms and conditions: Permission to use,
copy, modify and distribute this software and database and its documentation for any purpose and
without fee or royalty is hereby granted, provided that you agree to comply with the following
copyright notice and statements, including the disclaimer, and that the same appear on ALL copies
of the software, database and documentation, including modifications that you make for internal use
or for distribution.

THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR
WARRANTIES, EXPRESS OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES
NO REPRESENTATIONS OR WARRANTIES OF MERCHANTABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT
THE USE OF THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY
PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.

The name of Princeton University or Princeton may not be used in advertising or publicity
pertaining to distribution of the software and/or database. Title to copyright in this software,
database and any associated documentation shall at all times remain with Princeton University and
LICENSEE agrees to preserve same.
"""
NAMES = """
## Names

"World English Bible" is a trademark of eBible.org; "Project Gutenberg" is a registered trademark
whose headers were removed from the public domain texts that carried them. The names of projects,
companies and authors above are not used to endorse this model.
"""


def write_sources(work: Path, model_dir: Path) -> None:
    """Write `SOURCES.md` from the source list and the corpus statistics."""
    stats = json.loads((work / "text" / "stats.json").read_text(encoding="utf-8"))
    rows = []
    train_bytes = heldout_bytes = 0
    for source in SOURCES:
        own = stats[source.name]
        train_bytes += own["train_bytes"]
        heldout_bytes += own["heldout_bytes"]
        package = f"{source.package} {source.version}"
        package += " (PyPI)" if source.origin == "pypi" else ""
        cells = (
            source.name,
            package,
            source.licence,
            source.licence_note,
            f"{own['train_bytes']:,}",
            f"{own['heldout_bytes']:,}",
            f"{source.weight:g}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    rows.append(f"| **all** | | | | **{train_bytes:,}** | **{heldout_bytes:,}** | |")
    page = INTRODUCTION + "\n".join(rows) + "\n" + WORDNET + NAMES
    (model_dir / "SOURCES.md").write_text(page, encoding="utf-8")
