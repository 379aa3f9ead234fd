import pytest

from quantkit.calibration.scripts import script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        (" the", "Latin"),
        ("ß", "Latin"),
        (" и", "Cyrillic"),
        ("λόγος", "Greek"),
        ("東京", "Chinese characters"),
        ("カタカナ", "Japanese syllables"),
        ("한국", "Hangul"),
        ("عرب", "Arabic"),
        ("हि", "Devanagari"),
        ("ab12", "Latin"),
        ("12", "digits"),
        ("٣", "digits"),
        (");", "punctuation and symbols"),
        ("😀", "punctuation and symbols"),
        ("\n\t ", "white space"),
        ("\ufffd", "parts of characters"),
    ],
)
def test_the_script_is_that_of_the_letters(text, script):
    assert script_of(text) == script
