import itertools

from pipeline.study import Study, View


def test_the_view_of_evaluation_is_frontal_else_unknown_else_lateral():
    """docs/data.md: an image whose view is unknown counts as frontal; a lateral is taken where there is none."""
    for positions in itertools.permutations(["PA", "", "LATERAL"]):
        for some in (positions, [p for p in positions if p != "PA"], ["LATERAL"]):
            views = tuple(View(id=str(n), position=p) for n, p in enumerate(some))
            best = next(p for p in ("PA", "", "LATERAL") if p in some)
            assert Study("openi", "p", "s", "test", views, "said").first_frontal.position == best
    both = (View("a", ""), View("b", "AP"), View("c", "PA"), View("d", ""))
    assert Study("openi", "p", "s", "test", both, "said").first_frontal.id == "b"  # of equals the first
    assert Study("openi", "p", "s", "test", (both[0], both[3]), "said").first_frontal.id == "a"
