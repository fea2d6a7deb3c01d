"""Colours and markers of every picture."""

# Okabe and Ito's palette and markers: distinct to colour-blind readers and, by the markers, in grey. Eight colours and
# seven markers give 56 different pairs.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BLUE, ORANGE, GREEN, *_ = COLOURS
