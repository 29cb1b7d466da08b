"""What Arena-Hard's style control counts in an answer: headers, list items and bold words outside of blocks of code."""

import re

FENCED = re.compile(r"```([^`]*)```")


def markdown_counts(answer: str) -> dict[str, dict[str, int]]:
    """header_count, list_count and bold_count, by kind, as the published answers have them in their metadata."""
    # What stands in a block goes wherever it stands, as in the published counts: they are compared with these.
    for block in FENCED.findall(answer):
        answer = answer.replace(block, "")

    def lines(opening: str) -> int:
        return len(re.findall(f"^{opening}\\s", answer, re.MULTILINE))

    return {
        "header_count": {f"h{level}": lines(f"#{{{level}}}") for level in range(1, 7)},
        "list_count": {"ordered": lines(r"\s*\d+\."), "unordered": lines(r"\s*[-*+]")},
        "bold_count": {
            mark * 2: len(re.findall(rf"{bold}{bold}[^{mark}\n]+{bold}{bold}", answer))
            for mark, bold in (("*", r"\*"), ("_", "_"))
        },
    }
