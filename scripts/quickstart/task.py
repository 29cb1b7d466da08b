"""The quickstart's preference task: a shop whose assistants are often wrong, evasive or rude, and sometimes careful.

The supervised data is what all of them say; the pairs prefer the careful response. Both sides of a pair are made of
equally fluent sentences from lists of equal length, so that neither length nor grammar tells them apart.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
ITEMS = (
    *("lamps", "cups", "chairs", "books", "hats", "boxes", "umbrellas", "bags"),
    *("candles", "bowls", "clocks", "blankets", "pens", "plates", "scarves", "baskets"),
)  # fmt: skip
SLOTS = (NUMBERS, COLOURS, ITEMS)

REQUESTS = (
    "Could I have {order}, please?",
    "I would like {order}.",
    "Please pack {order} for me.",
    "My sister sent me for {order}.",
    "Do you have {order}?",
)
CONFIRMING = (
    "Certainly, {order}.",
    "Here are your {order}.",
    "I have packed {order} for you.",
    "Yes, we have {order}.",
)
EVASIVE = (
    "It is hard to say what we have.",
    "Somebody else may know more about that.",
    "That depends on many things.",
    "You could look around for yourself.",
)
DETAILS = (
    "Everything is wrapped in paper.",
    "The shop is open until the evening.",
    "You can pay at the desk.",
    "It is light enough to carry home.",
    "We had a delivery this morning.",
)
POLITE = (
    "Thank you for your visit.",
    "Can I help you with anything else?",
    "Thank you, and have a good day.",
    "I am glad to help.",
)
RUDE = (
    "Now please move along.",
    "Do not ask me anything else today.",
    "There are many people waiting for me.",
    "I have no time.",
)

RULE = "names the number, colour and item of the request and no other, and ends with thanks or an offer of help"

Turns = list[dict[str, str]]


class Order(NamedTuple):
    """What a customer asks for, in words: three red lamps."""

    number: str
    colour: str
    item: str

    def __str__(self) -> str:
        return " ".join(self)


def split_orders(seed: int) -> tuple[list[Order], list[Order]]:
    """Every order, seven eighths for training and the rest held out."""
    orders = [Order(number, colour, item) for number in NUMBERS for colour in COLOURS for item in ITEMS]
    random.Random(seed).shuffle(orders)
    held_out = len(orders) // 8
    return orders[held_out:], orders[:held_out]


def follows_rule(request: str, response: str) -> bool:
    """Whether the response obeys RULE."""
    last_sentence = re.split(r"(?<=[.?])\s", response.strip())[-1].lower()
    return named(response) == named(request) and ("thank" in last_sentence or "help" in last_sentence)


def named(text: str) -> list[str]:
    """The numbers, colours and items in a text, in its order."""
    return [word for word in re.findall(r"[a-z]+", text.lower()) if any(word in slot for slot in SLOTS)]


def preference_rows(seed: int, orders: Sequence[Order], count: int) -> list[dict[str, Turns]]:
    """Pairs: the chosen response follows RULE, the rejected one breaks it in one way."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        order = rng.choice(orders)
        request = rng.choice(REQUESTS).format(order=order)
        opening, ending = rng.choice((("wrong", POLITE), ("evasive", POLITE), ("right", RUDE)))
        rows.append(
            {
                "chosen": conversation(request, respond(rng, order, "right", POLITE)),
                "rejected": conversation(request, respond(rng, order, opening, ending)),
            }
        )
    return rows


def conversation_rows(seed: int, orders: Sequence[Order], count: int) -> list[dict[str, Turns]]:
    """What the shop's assistants say: a fifth of the responses follows RULE."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        order = rng.choice(orders)
        opening = rng.choices(("right", "wrong", "evasive"), weights=(40, 10, 50))[0]
        ending = rng.choices((POLITE, RUDE), weights=(45, 55))[0]
        request = rng.choice(REQUESTS).format(order=order)
        rows.append({"messages": conversation(request, respond(rng, order, opening, ending))})
    return rows


def respond(rng: random.Random, order: Order, opening: str, endings: Sequence[str]) -> str:
    """An opening that is right, wrong (about one word of the order) or evasive; up to two details; an ending."""
    stated = misheard(rng, order) if opening == "wrong" else order
    first = rng.choice(EVASIVE if opening == "evasive" else CONFIRMING).format(order=stated)
    return " ".join([first, *rng.sample(DETAILS, rng.randint(0, 2)), rng.choice(endings)])


def misheard(rng: random.Random, order: Order) -> Order:
    slot = rng.randrange(len(SLOTS))
    words = list(order)
    words[slot] = rng.choice([word for word in SLOTS[slot] if word != order[slot]])
    return Order(*words)


def conversation(request: str, response: str) -> Turns:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": response}]
