"""The demo's prompts: real questions of varied length, 40 to 120 tokens each with SmolLM2's chat template."""

from __future__ import annotations

PROMPTS = (
    "What is the capital of France, and on which river does it lie?",
    "Explain in one or two sentences why the sky is blue by day and red at sunset.",
    "Name three large rivers of Africa and one country that each of them crosses.",
    "Write a short, friendly reply to a customer whose parcel arrived two days late. Apologise once, say that"
    " the shipping fee is refunded, and offer help with anything else.",
    "A train leaves at 9:15 and arrives at 11:50. How long does the journey take? Show the steps.",
    "Give me a recipe for pancakes with flour, two eggs, milk and a pinch of salt. List the steps in order "
    "and say how long each side has to stay in the pan.",
    "What is the difference between weather and climate? Give one example of each.",
    "Translate into French: Good morning, I would like a cup of coffee and a croissant, please.",
    "Summarise this text in one sentence: The harbour was quiet that morning. Fishing boats lay tied to the "
    "pier, gulls walked along the wet stones, and an old man was mending a net. Nobody spoke, and the only "
    "sound was the water against the wood.",
    "Why do leaves change their colour in autumn, and why do some trees stay green all winter?",
    "Write a Python function that returns the sum of the even numbers in a list, with a short docstring. Then"
    " write three tests for it: one for an ordinary list, one for an empty list, and one for a list that "
    "holds only odd numbers. Say in one sentence why the empty list matters.",
    "List the planets of the solar system in the order of their distance from the sun.",
    "I have a job interview tomorrow for a position as a junior accountant. Give me three questions that I "
    "should expect and a good way to prepare for each of them.",
    "What does the heart do, and how many chambers does it have? Follow one drop of blood on its way from the"
    " lungs through the heart to a finger and back again, and say where it takes up oxygen and where it gives"
    " it away.",
    "Who wrote Romeo and Juliet, and in which city does the play take place?",
    "Turn these notes into a polite email: meeting moved, Thursday ten o'clock, room four, please bring the "
    "quarterly figures, lunch afterwards for those who like.",
    "What is photosynthesis? Explain it to a child of eight. Use short sentences, name the three things that "
    "a plant needs for it and the two things that come out of it, and end with a question that the child can "
    "answer by looking at a plant on the window sill.",
    "Compare trains and aeroplanes for a journey of six hundred kilometres. Consider the time from door to "
    "door, the price, the comfort and the effect on the climate, then say which one you would take.",
    "How do vaccines protect people from diseases? Explain what the body remembers, how long that lasts, and "
    "why some vaccines have to be repeated after a few years while others protect for a whole life.",
    "Write the first two sentences of a story about a lighthouse keeper who finds a letter in a bottle. It is"
    " a stormy night in November, the lamp has just gone out, and the letter is addressed to the keeper's own"
    " grandmother. Keep the tone calm and a little strange, and do not say what the letter is about.",
    "Sort these words alphabetically: pear, apple, orange, banana, cherry, grape.",
    "What should I check before I buy a used bicycle? Think of the frame, the brakes, the chain and the "
    "wheels, and tell me what would be expensive to repair.",
    "In which year did people first walk on the moon, and what was the name of the mission?",
    "Explain what a database index is, when it makes a query faster, and what it costs when rows are inserted.",
)
