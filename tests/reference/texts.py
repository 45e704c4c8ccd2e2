"""Texts for `make_greedy.py`: public domain (Lincoln 1863, Jefferson 1776, Carroll 1865) or written for this file."""

GETTYSBURG = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal.\n\n"
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so "
    "dedicated, can long endure. We are met on a great battle-field of that war. We have come to dedicate a portion "
    "of that field, as a final resting place for those who here gave their lives that that nation might live. It is "
    "altogether fitting and proper that we should do this."
)

DECLARATION = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another, and to assume among the powers of the earth, the separate and equal station "
    "to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind "
    "requires that they should declare the causes which impel them to the separation.\n\n"
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator "
    "with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.--That to "
    "secure these rights, Governments are instituted among Men, deriving their just powers from the consent of the "
    "governed, --That whenever any Form of Government becomes destructive of these ends, it is the Right of the "
    "People to alter or to abolish it, and to institute new Government, laying its foundation on such principles and "
    "organizing its powers in such form, as to them shall seem most likely to effect their Safety and Happiness. "
    "Prudence, indeed, will dictate that Governments long established should not be changed for light and transient "
    "causes; and accordingly all experience hath shewn, that mankind are more disposed to suffer, while evils are "
    "sufferable, than to right themselves by abolishing the forms to which they are accustomed. But when a long "
    "train of abuses and usurpations, pursuing invariably the same Object evinces a design to reduce them under "
    "absolute Despotism, it is their right, it is their duty, to throw off such Government, and to provide new "
    "Guards for their future security.--Such has been the patient sufferance of these Colonies; and such is now the "
    "necessity which constrains them to alter their former Systems of Government. The history of the present King of "
    "Great Britain is a history of repeated injuries and usurpations, all having in direct object the establishment "
    "of an absolute Tyranny over these States. To prove this, let Facts be submitted to a candid world.\n\n"
    "He has refused his Assent to Laws, the most wholesome and necessary for the public good.\n"
    "He has forbidden his Governors to pass Laws of immediate and pressing importance, unless suspended in their "
    "operation till his Assent should be obtained; and when so suspended, he has utterly neglected to attend to "
    "them.\n"
    "He has refused to pass other Laws for the accommodation of large districts of people, unless those people would "
    "relinquish the right of Representation in the Legislature, a right inestimable to them and formidable to "
    "tyrants only.\n"
    "He has called together legislative bodies at places unusual, uncomfortable, and distant from the depository of "
    "their public Records, for the sole purpose of fatiguing them into compliance with his measures.\n"
)

ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once "
    "or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "
    "\u201cand what is the use of a book,\u201d thought Alice \u201cwithout pictures or conversations?\u201d\n\n"
    "So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and "
    "stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the "
    "daisies, when suddenly a White Rabbit with pink eyes ran close by her.\n\n"
    "There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the "
    "Rabbit say to itself, \u201cOh dear! Oh dear! I shall be late!\u201d (when she thought it over afterwards, it "
    "occurred to her that she ought to have wondered at this, but at the time it all seemed quite natural); but when "
    "the Rabbit actually took a watch out of its waistcoat-pocket, and looked at it, and then hurried on, Alice "
    "started to her feet, for it flashed across her mind that she had never before seen a rabbit with either a "
    "waistcoat-pocket, or a watch to take out of it, and burning with curiosity, she ran across the field after it, "
    "and fortunately was just in time to see it pop down a large rabbit-hole under the hedge.\n\n"
    "In another moment down went Alice after it, never once considering how in the world she was to get out again.\n\n"
    "The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that "
    "Alice had not a moment to think about stopping herself before she found herself falling down a very deep well."
)

CODE = '''def merge_intervals(intervals):
    """Joins intervals that overlap; the result is sorted by start."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def test_merge_intervals():
    assert merge_intervals([(1, 3), (2, 6), (8, 10)]) == [[1, 6], [8, 10]]
    assert merge_intervals([]) == []


class Stack:
    def __init__(self):
        self._items = []

    def push(self, item):
        self._items.append(item)

    def pop(self):
'''

CONVERSATIONS = [
    [{"role": "user", "content": "Hello! Who are you?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because air scatters blue light more than red light."},
        {"role": "user", "content": "And why is it red at sunset?"},
    ],
    [
        {"role": "user", "content": '  Mind the spaces  \n\nand <b>this</b> & "that"\t\u2014 \U0001f600'},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "What is 12 * 12?"},
    ],
]

TRICKY_STRINGS = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n1",
    "x  1",
    "1234567890",
    "3.14159 and 1,000,000",
    "year 2026 \u00bd \u00b2 \u0664\u0662",
    "don't we'll I'M they'RE",
    "Hello, world!",
    "  leading and trailing  ",
    "tab\tand\r\nreturn",
    "caf\u00e9 na\u00efve cafe\u0301",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7",
    "nul\x00 zero\u200bwidth non\u00a0breaking \ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start |> <|im_end|><|im_end|>x",
    "if (a != b) { return a->c[0]; }  // done",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.org/a?b=1&c=%20#d_e",
]
