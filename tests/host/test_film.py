"""The film of a search shows what the search found."""

from maskunet_core.search.settings import SearchSettings

from . import search_film


def test_a_film_has_a_frame_for_each_look_of_a_real_search():
    settings = SearchSettings(candidates=3, candidate_percent=0.5, iterations=1, start_percent=1.0)
    search_film.load_extension()
    moments = search_film.Filmed(settings).film()
    judged, updated, ends = moments[:3], moments[4:-2], moments[-2:]
    assert [len(moment.candidates) for moment in judged] == [1, 2, 3]
    scores = [score for _, score in moments[3].candidates]
    assert moments[3].chosen == scores.index(max(scores))
    assert len(updated) == len(ends[0].updates) == 2  # One look before the update and one after it.
    assert ends[0].picture.tobytes() != ends[1].picture.tobytes()
    assert all(moment.right is not None for moment in ends)
    frames = search_film.one_palette([search_film.Screen(moments).frame(moment) for moment in moments])
    assert len({frame.tobytes() for frame in frames}) == len(moments)
