"""Classes of characters for the patterns of pre-tokenisers: parts of regular expressions.

llama.cpp classifies characters by Unicode 15.1, the regular expressions of `tokenizers` by 16.0. The
characters that 16.0 added are left out here; otherwise a text with one of them would be cut differently.
"""

_LATER_LETTERS = (
    r"\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D4A}-\x{10D65}"
    r"\x{10D6F}-\x{10D85}\x{10EC2}-\x{10EC4}\x{11380}-\x{11389}\x{1138B}\x{1138E}\x{11390}-\x{113B5}"
    r"\x{113B7}\x{113D1}\x{113D3}\x{11BC0}-\x{11BE0}\x{13460}-\x{143FA}\x{16100}-\x{1611D}"
    r"\x{16D40}-\x{16D6C}\x{18CFF}\x{1E5D0}-\x{1E5ED}\x{1E5F0}"
)
_LATER_NUMBERS = (
    r"\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{16130}-\x{16139}\x{16D70}-\x{16D79}"
    r"\x{1CCF0}-\x{1CCF9}\x{1E5F1}-\x{1E5FA}"
)
_LATER_PUNCTUATION = (
    r"\x{1B4E}-\x{1B4F}\x{1B7F}\x{10D6E}\x{113D4}-\x{113D5}\x{113D7}-\x{113D8}\x{11BE1}"
    r"\x{16D6D}-\x{16D6F}\x{1E5FF}"
)
_LATER_MARKS = (
    r"\x{897}\x{10D69}-\x{10D6D}\x{10EFC}\x{113B8}-\x{113C0}\x{113C2}\x{113C5}\x{113C7}-\x{113CA}"
    r"\x{113CC}-\x{113D0}\x{113D2}\x{113E1}-\x{113E2}\x{11F5A}\x{1611E}-\x{1612F}\x{1E5EE}-\x{1E5EF}"
)
_LATER_SYMBOLS = (
    r"\x{2427}-\x{2429}\x{31E4}-\x{31E5}\x{10D8E}-\x{10D8F}\x{1CC00}-\x{1CCEF}\x{1CD00}-\x{1CEB3}"
    r"\x{1F8B2}-\x{1F8BB}\x{1F8C0}-\x{1F8C1}\x{1FA89}\x{1FA8F}\x{1FABE}\x{1FAC6}\x{1FADC}\x{1FADF}"
    r"\x{1FAE9}\x{1FBCB}-\x{1FBEF}"
)
LETTER = rf"[\p{{L}}&&[^{_LATER_LETTERS}]]"
NUMBER = rf"[\p{{N}}&&[^{_LATER_NUMBERS}]]"
PUNCTUATION = rf"[\p{{P}}&&[^{_LATER_PUNCTUATION}]]"
MARK = rf"[\p{{M}}&&[^{_LATER_MARKS}]]"
SYMBOL = rf"[\p{{S}}&&[^{_LATER_SYMBOLS}]]"
LETTER_OR_MARK = rf"(?:{LETTER}|{MARK})"
#: Neither white space, letter nor number.
OTHER = rf"[[^\s\p{{L}}\p{{N}}]{_LATER_LETTERS}{_LATER_NUMBERS}]"
#: One of these may lead a word: anything but the end of a line, a letter or a number.
LEADER = rf"[[^\r\n\p{{L}}\p{{N}}]{_LATER_LETTERS}{_LATER_NUMBERS}]"
#: The same if words may contain marks, and are led by anything but letters, punctuation and symbols.
OTHER_BUT_MARKS = rf"(?!{MARK}){OTHER}"
LEADER_BUT_SIGNS = rf"(?![\r\n]|{LETTER}|{PUNCTUATION}|{SYMBOL})(?m:.)"

# Letters as llama.cpp distinguishes upper from lower case: a letter that is not ASCII counts as either.
CAPITAL = rf"(?![a-z]){LETTER}"
SMALL = rf"(?![A-Z]){LETTER}"
#: The letters with two cases in DeepSeek's first vocabularies.
CASED = (
    r"\x{41}-\x{5A}\x{61}-\x{7A}\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}"
    r"\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}"
    r"\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}"
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}"
    r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}"
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}"
    r"\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}"
    r"\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}"
    r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}"
    r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}"
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}"
    r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}"
    r"\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}"
    r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}"
    r"\x{1E900}-\x{1E943}"
)
#: Chinese characters, both letters and others.
HAN = (
    r"[\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}"
    r"\x{2F800}-\x{2FA1F}]"
)
#: Ideographs and kana, as in the pattern of DeepSeek-V3.
IDEOGRAPH_OR_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]"
