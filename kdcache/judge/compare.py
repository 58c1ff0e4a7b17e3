"""Whether texts, outputs of programs and numbers are equal. Everything here takes linear time.

Outputs of programs are compared word by word, in order, whatever whitespace is between them; case matters. Words are
equal as text after Unicode's NFC, or as numbers if either has a decimal point or an exponent: within 1e-6, absolute or
relative, but only absolute where the expected number is whole. (Codeforces' own wcmp and rcmp6 do this, without telling
whole numbers from decimal ones.)
"""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal

from kdcache.judge.kinds import TOLERANCE

MOST_DIGITS = 400  # of a word that is read as a number


def nfc(text: str) -> str:
    """Return Unicode's NFC of a text; the text itself if more than 30 marks follow each other in it.

    Those would take quadratic time. 30 is what Unicode's "stream-safe" format allows; no language comes near it.
    """
    run = 0
    if not text.isascii():
        for character in text:
            run = run + 1 if unicodedata.combining(character) else 0
            if run > 30:
                return text
    return unicodedata.normalize("NFC", text)


def same_text(text: str, expected: str) -> bool:
    """Return whether two texts are equal after NFC, with runs of whitespace as one blank."""
    return nfc(text).split() == nfc(expected).split()


# --- outputs of programs ----------------------------------------------------------------------------------------------


def same_words(output: str, expected: str) -> bool:
    """Return whether an output is right: see the module's docstring."""
    words, wanted = nfc(output).split(), nfc(expected).split()
    return len(words) == len(wanted) and all(a == b or _same_number(a, b) for a, b in zip(words, wanted))


_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def as_number(word: str) -> float | None:
    """Return a word of a program's output as a number; None if it is none."""
    return float(word) if len(word) <= MOST_DIGITS and _DECIMAL.fullmatch(word) else None


def _same_number(word: str, wanted: str) -> bool:
    """Return whether two words are numbers, one of them with a decimal point or an exponent, and as good as equal."""
    value, wanted_value = as_number(word), as_number(wanted)
    if value is None or wanted_value is None:
        return False
    if not math.isfinite(value) or not math.isclose(value, wanted_value, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return False
    if not wanted.lstrip("+-").isdigit():
        return True
    # A whole number is wanted. Floats cannot tell large ones apart, and two whole numbers must be equal as text.
    return not word.lstrip("+-").isdigit() and abs(Decimal(word) - Decimal(wanted)) <= Decimal(TOLERANCE)


# --- the last number of a text ----------------------------------------------------------------------------------------

_BLANKS = " \u00a0\u2009\u202f'’"
_GROUPED = rf"\d{{1,3}}(?:[{_BLANKS}]\d{{3}})+(?!\d)(?:[.,]\d+)?"
_NUMBER = re.compile(rf"(?<![\w.,])([-+−]?)[$€£]?({_GROUPED}|\d+(?:[.,]\d+)*|[.,]\d+)((?:[eE][+-]?\d+)?)")

_FRACTION = re.compile(
    r"(?<![\w.,/])([-+−]?\d{1,30}) ?/ ?(\d{1,30})(?![\w/]|[.,]\d)|([-+−]?)\\[dt]?frac\{ ?([-+−]?\d{1,30}) ?\}\{ ?(\d{1,30}) ?\}"
)


def count_numbers(text: str) -> int:
    """Return how many numbers a text has. A fraction (3/4, \\frac{3}{4}) is one number."""
    return len(_NUMBER.findall(_FRACTION.sub("0", text)))


def last_number(text: str) -> list[float]:
    """Return the readings of a text's last number, the likelier first; none if it has no number.

    1,234 is 1234 in English and 1.234 in Spanish. A fraction is one number.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return []
    fractions = list(_FRACTION.finditer(text))
    if fractions and fractions[-1].end() >= numbers[-1].end():
        return [_fraction_value(fractions[-1])]
    sign, digits, exponent = numbers[-1].groups()
    if len(digits) + len(exponent) > MOST_DIGITS:
        return []
    blocks = re.split(f"[{_BLANKS}]", digits)
    readings = _readings("".join(blocks))
    if len(blocks) > 1:  # "1 234" may also be a list of numbers, of which 234 is the last
        readings += _readings(blocks[-1])
    return [float(f"{'-' if sign in '-−' and sign else ''}{reading}{exponent}") for reading in readings]


def _fraction_value(fraction: re.Match[str]) -> float:
    sign, above, below = (fraction[3], fraction[4], fraction[5]) if fraction[4] else ("", fraction[1], fraction[2])
    value = int(above.replace("−", "-")) / int(below) if int(below) else math.nan
    return -value if sign in ("-", "−") else value


def _readings(digits: str) -> list[str]:
    """Return what digits with points and commas may mean, in Python's notation, the likelier first."""
    separators = re.sub(r"\d", "", digits)
    without_separators = re.sub("[.,]", "", digits)
    if not separators:
        return [without_separators]
    head, tail = re.split(r"[.,](?=\d+$)", digits)
    decimal = re.sub("[.,]", "", head) + "." + tail
    if len(separators) > 1:  # 1,234.5 has a decimal point, 1,234,567 has none
        return [decimal if separators[-1] != separators[0] else without_separators]
    if len(tail) == 3 and 1 <= len(head) <= 3 and head != "0":
        return [without_separators, decimal] if separators == "," else [decimal, without_separators]
    return [decimal]
