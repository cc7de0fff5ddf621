"""Questions and texts small enough to score by hand."""

from __future__ import annotations

QUESTIONS = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
    {"question": "Ann has 1,200 nuts and eats 7. How many are left?", "answer": "1200 - 7 = 1193\n#### 1,193"},
    {"question": "Half of 9?", "answer": "9 / 2 = 4.5\n#### 4.5"},
    {"question": "And 3 x 4, then?", "answer": "#### 12"},
    {"question": "Zero?", "answer": "It is none.\n#### 0"},
]
CHOICES = [
    {"question": "Which is wet?", "choices": ["a stone", "water", "dry sand", "a"], "answer": 1},
    {"question": "Which one of these animals can fly?", "choices": ["cow", "wren", "ant eater"], "answer": 1},
    {"question": "Up?", "choices": ["x", "y", "z", "w"], "answer": 0},
    {"question": "Colour of snow", "choices": ["white", "black", "white as milk", "red"], "answer": 0},
]
TEXTS = ["A short text.", "A somewhat longer text, with a second half to it; and a third.", "Hm", "No, 12 of them!"]
