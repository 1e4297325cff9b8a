from semantic_diffusion_adapter.kernels.words import END, PAD, UNKNOWN, split, word_ids

IDS = {word: 3 + n for n, word in enumerate(("remove", "the", "red", "circle", "20"))}


def test_words_and_numbers_in_lower_case():
    assert split("Remove the RED, circle! 20px") == ["remove", "the", "red", "circle", "20", "px"]


def test_ids_are_padded_and_cut_before_the_end_mark():
    assert word_ids("Remove the RED zebra", IDS, 7) == [3, 4, 5, UNKNOWN, END, PAD, PAD]
    assert word_ids("", IDS, 3) == [END, PAD, PAD]
    assert word_ids("red " * 9, IDS, 4) == [5, 5, 5, END]
