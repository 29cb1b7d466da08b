"""A row for a terminal or a pipe: colours where there are colours, marks where there are none."""

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from .rows import Cut, ShownRow, Side, Token

HEAD, TAIL = 60, 30  # tokens of a prompt or response that are shown, unless all are asked for
LEGEND = "prompt dim, scored green, every other token underlined, special tokens reversed, cuts red"
MARKS = "· between tokens, ⟦special tokens⟧, ✂ what was cut, ~ a character that goes on in the next token"


def has_colours(console: Console) -> bool:
    """A terminal, unless the environment's NO_COLOR asks for none."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def show_row(console: Console, row: ShownRow, *, whole: bool) -> None:
    """whole: every token, instead of the beginnings and ends of long parts."""
    console.print()
    console.print(Text(f"row {row.index:,} ({row.why})", style="bold"))
    for name, part in parts_of(row):
        console.print(Text(f"{name}, {sum(isinstance(piece, Token) for piece in part):,} tokens"), style="cyan")
        console.print(line_of(part if whole else list(shortened(part)), colours=has_colours(console)), soft_wrap=False)


Piece = Token | Cut | str


def parts_of(row: ShownRow) -> Iterator[tuple[str, list[Piece]]]:
    """The prompt, once where both sides have the same, and each response; or a conversation."""
    prompts = [side_pieces(side)[0] for side in row.sides]
    if row.sides[0].prompt_length == 0 and len(row.sides) == 1:
        yield "conversation, scored but for its first token", side_pieces(row.sides[0])[1]
        return
    same = all(prompt == prompts[0] for prompt in prompts)
    for side, prompt in [(None, prompts[0])] if same else list(zip(row.sides, prompts, strict=True)):
        yield "prompt" if side is None else f"prompt of {side.name}", prompt
    for side in row.sides:
        yield f"{side.name}, scored", side_pieces(side)[1]


def side_pieces(side: Side) -> tuple[list[Piece], list[Piece]]:
    """Prompt and response with their cuts in place. A cut between the two is the prompt's, one at the end the response's."""
    prompt: list[Piece] = list(side.tokens[: side.prompt_length])
    response: list[Piece] = list(side.tokens[side.prompt_length :])
    for cut in side.cuts:
        if cut.before <= side.prompt_length and cut.before < len(side.tokens):
            prompt.insert(cut.before, cut)
        else:
            response.append(cut)
    return prompt, response


def shortened(part: list[Piece]) -> Iterator[Piece]:
    left_out = len(part) - HEAD - TAIL
    if left_out <= 1:
        yield from part
        return
    yield from part[:HEAD]
    yield f"... {left_out:,} more ..."
    yield from part[-TAIL:]


def line_of(part: list[Piece], *, colours: bool) -> Text:
    line, number = Text(), 0
    for piece in part:
        if isinstance(piece, Token):
            if colours:
                line.append(visible(piece), style_of(piece, number))
            else:
                line.append(("·" if line else "") + (f"⟦{visible(piece)}⟧" if piece.is_special else visible(piece)))
            number += 1
        else:
            text = f" {piece} " if isinstance(piece, str) else f" ✂ {piece.tokens:,} tokens cut ✂ "
            line.append(text, "bold red" if colours else "")
    return line


def visible(token: Token) -> str:
    """Its text with line breaks and tabs to be seen."""
    return token.text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") or "~"


def style_of(token: Token, number: int) -> str:
    colour = "green" if token.is_scored else "dim"
    return f"{colour}{' reverse' if token.is_special else ''}{' underline' if number % 2 else ''}"
