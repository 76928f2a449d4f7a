"""Real sentences for the encoder, from books and speeches whose copyright has long expired.

From: Jane Austen, Pride and Prejudice (1813); Mary Shelley, Frankenstein (1818); Herman Melville, Moby-Dick
(1851); Henry David Thoreau, Walden (1854); Charles Dickens, A Tale of Two Cities (1859); Charles Darwin, On
the Origin of Species (1859); Michael Faraday, The Chemical History of a Candle (1861); Abraham Lincoln,
Gettysburg Address (1863); Lewis Carroll, Alice's Adventures in Wonderland (1865); Mark Twain, Adventures of
Huckleberry Finn (1884); Arthur Conan Doyle, The Adventures of Sherlock Holmes (1892); H. G. Wells, The Time
Machine (1895) and The War of the Worlds (1898); Bram Stoker, Dracula (1897); Adam Smith, The Wealth of
Nations (1776).
"""

_TEXT = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of
a wife.

I could easily forgive his pride, if he had not mortified mine.

Vanity and pride are different things, though the words are often used synonymously.

It was on a dreary night of November that I beheld the accomplishment of my toils.

Beware; for I am fearless, and therefore powerful.

Nothing is so painful to the human mind as a great and sudden change.

Call me Ishmael.

Some years ago, never mind how long precisely, having little or no money in my purse, and nothing particular
to interest me on shore, I thought I would sail about a little and see the watery part of the world.

Better sleep with a sober cannibal than a drunken Christian.

I went to the woods because I wished to live deliberately, to front only the essential facts of life, and see
if I could not learn what it had to teach.

The mass of men lead lives of quiet desperation.

If a man does not keep pace with his companions, perhaps it is because he hears a different drummer.

It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.

A wonderful fact to reflect upon, that every human creature is constituted to be that profound secret and
mystery to every other.

It is a far, far better thing that I do, than I have ever done.

There is grandeur in this view of life, with its several powers, having been originally breathed into a few
forms or into one.

I have called this principle, by which each slight variation, if useful, is preserved, by the term of Natural
Selection.

Light will be thrown on the origin of man and his history.

There is no better, there is no more open door by which you can enter into the study of natural philosophy
than by considering the physical phenomena of a candle.

You see, then, in the first instance, that a beautiful cup is formed.

Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in
Liberty, and dedicated to the proposition that all men are created equal.

The world will little note, nor long remember what we say here, but it can never forget what they did here.

Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.

Oh dear! Oh dear! I shall be late!

We're all mad here. I'm mad. You're mad.

Begin at the beginning, and go on till you come to the end: then stop.

You don't know about me without you have read a book by the name of The Adventures of Tom Sawyer; but that
ain't no matter.

Human beings can be awful cruel to one another.

To Sherlock Holmes she is always the woman.

It is a capital mistake to theorize before one has data.

You see, but you do not observe. The distinction is clear.

The Time Traveller (for so it will be convenient to speak of him) was expounding a recondite matter to us.

No one would have believed in the last years of the nineteenth century that this world was being watched
keenly and closely by intelligences greater than man's and yet as mortal as his own.

Yet across the gulf of space, minds that are to our minds as ours are to those of the beasts that perish,
intellects vast and cool and unsympathetic, regarded this earth with envious eyes.

Listen to them, the children of the night. What music they make!

I am longing to be with you, and by the sea, where we can talk together freely and build our castles in the
air.

It is not from the benevolence of the butcher, the brewer, or the baker, that we expect our dinner, but from
their regard to their own interest.

The greatest improvement in the productive powers of labour seems to have been the effects of the division of
labour.
"""

# A sentence is a paragraph of the text above.
SENTENCES: tuple[str, ...] = tuple(" ".join(paragraph.split()) for paragraph in _TEXT.split("\n\n"))
