"""The demo's prompts: real questions of varied length, 40 to 120 tokens each with SmolLM2's chat template."""

from __future__ import annotations

PROMPTS = (
    "What is the capital of France, and on which river does it lie?",
    "Explain in one or two sentences why the sky is blue by day and red at sunset. Imagine that you talk to a"
    " friend who has never heard of wave lengths, and use the picture of a ball that rolls through a dense "
    "crowd of people.",
    "Name three large rivers of Africa and one country that each of them crosses. Then say which of the three"
    " is the longest, into which sea it flows, and for what people along its banks have used it since ancient"
    " times.",
    "Write a short, friendly reply to a customer whose parcel arrived two days late. Apologise once, say that"
    " the shipping fee is refunded, and offer help with anything else.",
    "A train leaves at 9:15 and arrives at 11:50. It stops twice on the way, for six minutes each time. How "
    "long does the journey take, and for how long does the train really move? Show the steps one after the "
    "other and write the result in hours and minutes.",
    "Give me a recipe for pancakes with flour, two eggs, milk and a pinch of salt. List the steps in order "
    "and say how long each side has to stay in the pan.",
    "What is the difference between weather and climate? Give one example of each.",
    "Translate into French: Good morning, I would like a cup of coffee and a croissant, please. Could you "
    "also tell me when the next bus to the station leaves, and whether I have to buy the ticket before I get "
    "on?",
    "Summarise this text in one sentence: The harbour was quiet that morning. Fishing boats lay tied to the "
    "pier, gulls walked along the wet stones, and an old man was mending a net. Nobody spoke, and the only "
    "sound was the water against the wood.",
    "Why do leaves change their colour in autumn, and why do some trees stay green all winter? Mention what "
    "happens to the green in the leaf, where the yellow and the red come from, and what a needle has that a "
    "broad leaf has not.",
    "Write a Python function that returns the sum of the even numbers in a list, with a short docstring. Then"
    " write three tests for it: one for an ordinary list, one for an empty list, and one for a list that "
    "holds only odd numbers. Say in one sentence why the empty list matters.",
    "List the planets of the solar system in the order of their distance from the sun. Mark those that are "
    "made of gas, and say which of them has the most moons and which one turns the fastest around itself.",
    "I have a job interview tomorrow for a position as a junior accountant. Give me three questions that I "
    "should expect and a good way to prepare for each of them.",
    "What does the heart do, and how many chambers does it have? Follow one drop of blood on its way from the"
    " lungs through the heart to a finger and back again, and say where it takes up oxygen and where it gives"
    " it away.",
    "Who wrote Romeo and Juliet, and in which city does the play take place? Tell the story in four "
    "sentences: how the two meet, why their families are against it, what the plan of the friar is, and what "
    "goes wrong with the letter.",
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
    "In which year did people first walk on the moon, and what was the name of the mission? Name the three "
    "people who were on board, say which of them stayed in orbit and what his task was, and how long the "
    "whole journey took from start to landing in the sea.",
    "Explain what a database index is, when it makes a query faster, and what it costs when rows are "
    "inserted. Use a table of a million customers with name, city and date of birth as the example, and say "
    "which index helps to find everybody who lives in one city and was born in May.",
)
