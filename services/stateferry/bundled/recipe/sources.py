"""The list of texts the bundled model learns from, one record per package.

Every entry is text that a Debian or PyPI package distributes and whose terms (public domain or a
permissive licence) allow both training and shipping the result under Apache-2.0.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Origin = Literal["debian", "pypi"]
Reader = Literal["html", "sword_bible", "sword_commentary", "r_strings", "plain", "wordnet"]

BUILD_PAGES = r"(_modules|_sources|_static|/src/|genindex|py-modindex|search\.html|/js/)"


@dataclasses.dataclass(frozen=True)
class Source:
    """One text collection.

    `version` is the version the shipped model was trained on. `files` are glob patterns below the
    unpacked package; `exclude` is a regular expression on the path. `weight` is the number of
    passes over this source per training epoch (a fraction takes a random subset each epoch).
    `tables_are_layout` marks pages from before style sheets, whose text sits in tables.
    `licence` is an SPDX expression or a short name; `licence_note` says whose text it is.
    """

    name: str
    package: str
    version: str
    licence: str
    licence_note: str
    reader: Reader
    files: tuple[str, ...]
    weight: float
    exclude: str = ""
    origin: Origin = "debian"
    tables_are_layout: bool = False


def _manual(
    package: str,
    version: str,
    licence: str,
    holder: str,
    *,
    files: str = "usr/share/doc/**/*.html",
    exclude: str = BUILD_PAGES,
    weight: float = 1.0,
) -> Source:
    """A package of HTML documentation."""
    return Source(package, package, version, licence, holder, "html", (files,), weight, exclude)


PROSE: tuple[Source, ...] = (
    Source(
        "austen",
        "r-cran-janeaustenr",
        "1.0.0-1",
        "public domain (package: MIT)",
        "six novels of Jane Austen, 1803-1818; packaged by Julia Silge",
        "r_strings",
        ("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
        1.5,
    ),
    Source(
        "tom_sawyer",
        "golang-github-klauspost-compress-dev",
        "1.15.12+ds1-3",
        "public domain (package: BSD-3-Clause)",
        "The Adventures of Tom Sawyer, Mark Twain, 1876",
        "plain",
        ("usr/share/gocode/**/compress/testdata/Mark.Twain-Tom.Sawyer.txt",),
        1.5,
    ),
    Source(
        "opticks",
        "golang-1.19-src",
        "1.19.8-2",
        "public domain (package: BSD-3-Clause)",
        "Opticks, Isaac Newton, 1730",
        "plain",
        ("usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt",),
        1.3,
    ),
    Source(
        "botchan",
        "sentencepiece",
        "0.2.3",
        "public domain (package: Apache-2.0)",
        "Botchan, Natsume Soseki, translated by Yasotaro Morri, 1919",
        "plain",
        ("*/test/botchan.txt",),
        1.5,
        origin="pypi",
    ),
    Source(
        "kjv",
        "sword-text-kjv",
        "14.3-1",
        "public domain",
        "King James Version, 1611/1769",
        "sword_bible",
        ("usr/share/sword/modules/texts/ztext/*/?t.bzs",),
        1.0,
    ),
    Source(
        "web",
        "sword-text-web",
        "426.0-1",
        "public domain",
        "World English Bible",
        "sword_bible",
        ("usr/share/sword/modules/texts/ztext/*/?t.bzs",),
        1.0,
    ),
    Source(
        "treasury",
        "sword-comm-tdavid",
        "2.1-1",
        "public domain",
        "The Treasury of David, C. H. Spurgeon, 1885",
        "sword_commentary",
        ("usr/share/sword/modules/comments/zcom/*/?t.czs",),
        1.0,
    ),
    Source(
        "henry",
        "sword-comm-mhcc",
        "2.0-1",
        "public domain",
        "Concise Commentary, Matthew Henry, 1706",
        "sword_commentary",
        ("usr/share/sword/modules/comments/zcom/*/?t.bzs",),
        1.0,
    ),
    Source(
        "scofield",
        "sword-comm-scofield",
        "2.1-1",
        "public domain",
        "Reference Notes, C. I. Scofield, 1917",
        "sword_commentary",
        ("usr/share/sword/modules/comments/zcom/*/?t.bzs",),
        1.0,
    ),
    Source(
        "devil",
        "dict-devil",
        "1.0-13.1",
        "public domain",
        "The Devil's Dictionary, Ambrose Bierce, 1911",
        "plain",
        ("usr/share/dictd/devil.dict.dz",),
        1.3,
    ),
    Source(
        "jargon",
        "jargon-text",
        "4.4.7-4.1",
        "public domain",
        "The Jargon File 4.4.7",
        "plain",
        ("usr/share/doc/jargon-text/jargon.txt.gz",),
        1.3,
    ),
    Source(
        "nocopyright",
        "cfi-en",
        "3.0-10.2",
        "public domain",
        "Copyright Does Not Exist, Linus Walleij",
        "html",
        ("usr/share/doc/cfi-en/html/*.htm",),
        1.3,
        tables_are_layout=True,
    ),
    Source(
        "wordnet",
        "wordnet-base",
        "1:3.0-37",
        "WordNet-3.0",
        "WordNet 3.0 glosses, Princeton University",
        "wordnet",
        ("usr/share/wordnet/data.*",),
        0.7,
    ),
)

MANUALS: tuple[Source, ...] = (
    _manual(
        "python3.11-doc", "3.11.2-6+deb12u9", "PSF-2.0", "Python Software Foundation", weight=1.2
    ),
    _manual(
        "postgresql-doc-15",
        "15.20-0+deb12u1",
        "PostgreSQL",
        "PostgreSQL Global Development Group",
        weight=1.2,
    ),
    _manual("sqlite3-doc", "3.40.1-2+deb12u2", "public domain", "SQLite authors", weight=1.2),
    _manual(
        "rust-doc",
        "1.63.0+dfsg1-2",
        "MIT OR Apache-2.0",
        "The Rust Project Developers",
        exclude=BUILD_PAGES + r"|/core/|/alloc/|/std/arch|/proc_macro/|/test/|print\.html",
        weight=1.2,
    ),
    _manual(
        "apache2-doc",
        "2.4.71-1~deb12u1",
        "Apache-2.0",
        "Apache Software Foundation",
        files="usr/share/doc/apache2-doc/manual/en/**/*.html",
        weight=1.2,
    ),
    _manual(
        "python-django-doc",
        "3:3.2.25-0+deb12u7",
        "BSD-3-Clause",
        "Django Software Foundation",
        weight=1.2,
    ),
    _manual("python-sqlalchemy-doc", "1.4.46+ds1-1", "MIT", "SQLAlchemy authors"),
    _manual(
        "llvm-15-doc",
        "1:15.0.6-4",
        "Apache-2.0 WITH LLVM-exception",
        "LLVM contributors",
        exclude=BUILD_PAGES + "|AMDGPU/",
    ),
    _manual("clang-15-doc", "1:15.0.6-4", "Apache-2.0 WITH LLVM-exception", "LLVM contributors"),
    _manual("sphinx-doc", "5.3.0-4", "BSD-2-Clause", "Sphinx team"),
    _manual("varnish-doc", "7.1.1-2+deb12u1", "BSD-2-Clause", "Varnish Software", weight=1.2),
    _manual("nova-doc", "2:26.2.2-1~deb12u5", "Apache-2.0", "OpenStack contributors"),
    _manual("neutron-doc", "2:21.0.0-7+deb12u1", "Apache-2.0", "OpenStack contributors"),
    _manual("keystone-doc", "2:22.0.2-0+deb12u6", "Apache-2.0", "OpenStack contributors"),
    _manual("cinder-doc", "2:21.3.1-1~deb12u1", "Apache-2.0", "OpenStack contributors"),
    _manual("ironic-doc", "1:21.4.4-0+deb12u2", "Apache-2.0", "OpenStack contributors"),
    _manual("swift-doc", "2.30.1-0+deb12u3", "Apache-2.0", "OpenStack contributors"),
    _manual("heat-doc", "1:19.0.0-3", "Apache-2.0", "OpenStack contributors"),
    _manual("cmake-doc", "3.25.1-1", "BSD-3-Clause", "Kitware and contributors"),
    _manual("krb5-doc", "1.20.1-2+deb12u5", "MIT", "Massachusetts Institute of Technology"),
    _manual("borgbackup-doc", "1.2.4-1", "BSD-3-Clause", "The Borg Collective", weight=1.2),
    _manual("mypy-doc", "1.0.1-1", "MIT", "Jukka Lehtosalo and contributors"),
    _manual("pypy3-doc", "7.3.11+dfsg-2+deb12u3", "MIT", "PyPy contributors", weight=1.2),
    _manual("openvswitch-doc", "3.1.0-2+deb12u1", "Apache-2.0", "Open vSwitch contributors"),
    _manual("ghc-doc", "9.0.2-4", "BSD-3-Clause", "The University Court of Glasgow and others"),
    _manual("python-sklearn-doc", "1.2.1+dfsg-1", "BSD-3-Clause", "scikit-learn developers"),
    _manual("python-scipy-doc", "1.10.1-2", "BSD-3-Clause", "SciPy developers"),
    _manual("python-pandas-doc", "1.5.3+dfsg-2", "BSD-3-Clause", "pandas development team"),
    _manual("python-statsmodels-doc", "0.13.5+dfsg-7", "BSD-3-Clause", "statsmodels developers"),
    _manual("python-xarray-doc", "2023.01.0-1.1", "Apache-2.0", "xarray developers"),
    _manual("python-dask-doc", "2022.12.1+dfsg-2", "BSD-3-Clause", "Dask development team"),
    _manual("libboost1.74-doc", "1.74.0+ds1-21", "BSL-1.0", "Boost contributors"),
    _manual(
        "erlang-doc",
        "1:25.2.3+dfsg-1+deb12u4",
        "Apache-2.0",
        "Ericsson AB",
        exclude=BUILD_PAGES + "|/wx-",
    ),
    _manual("nodejs-doc", "18.20.4+dfsg-1~deb12u3", "MIT", "Node.js contributors"),
    _manual(
        "ant-doc",
        "1.10.13-1",
        "Apache-2.0",
        "Apache Software Foundation",
        exclude=BUILD_PAGES + "|/api/",
    ),
    _manual("nim-doc", "1.6.10-2", "MIT", "Andreas Rumpf and contributors"),
    _manual(
        "twisted-doc",
        "22.4.0-4+deb12u1",
        "MIT",
        "Twisted Matrix Laboratories",
        exclude=BUILD_PAGES + "|/api/",
        weight=1.2,
    ),
    _manual("glance-doc", "2:25.1.0-2+deb12u5", "Apache-2.0", "OpenStack contributors"),
    _manual("manila-doc", "1:15.1.0-2", "Apache-2.0", "OpenStack contributors"),
    _manual("octavia-doc", "11.0.0-2+deb12u1", "Apache-2.0", "OpenStack contributors"),
    _manual("senlin-doc", "14.0.0-1", "Apache-2.0", "OpenStack contributors"),
    _manual(
        "ntpsec-doc",
        "1.2.2+dfsg1-1+deb12u1",
        "NTP AND BSD-2-Clause",
        "University of Delaware and the NTPsec Project",
    ),
    _manual("numba-doc", "0.56.4+dfsg-2", "BSD-2-Clause", "Anaconda, Inc."),
    _manual("emscripten-doc", "3.1.6~dfsg-5", "MIT", "Emscripten authors"),
    _manual("python-sympy-doc", "1.11.1-1", "BSD-3-Clause", "SymPy development team"),
    _manual("python-skimage-doc", "0.19.3-8", "BSD-3-Clause", "scikit-image team"),
    _manual("python-setuptools-doc", "66.1.1-1+deb12u2", "MIT", "Python Packaging Authority"),
    _manual("python-pytest-doc", "7.2.1-2", "MIT", "Holger Krekel and others"),
    _manual("python-flask-doc", "2.2.2-3", "BSD-3-Clause", "Pallets"),
    _manual("python-scrapy-doc", "2.8.0-2", "BSD-3-Clause", "Scrapy developers"),
    _manual("python-tornado-doc", "6.2.0-3+deb12u4", "Apache-2.0", "The Tornado Authors"),
    _manual("crystal-doc", "1.6.0+dfsg-3", "Apache-2.0", "Manas Technology Solutions"),
    _manual("chezscheme-doc", "9.5.8+dfsg-1", "Apache-2.0", "Cisco Systems, Inc."),
)

SOURCES: tuple[Source, ...] = PROSE + MANUALS
