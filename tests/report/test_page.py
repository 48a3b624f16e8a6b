"""The page of a plan: its data on their own, and the page in a real browser, where there is one.

``SHARDWRIGHT_REQUIRE_BROWSER=1`` makes a missing Chromium an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.api.plan_for import plan_for
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Plan
from shardwright.report.page import page_data, render, write_page
from shardwright.report.page.tables import Tables
from shardwright.report.page.tree import module_tree

WIDTH = 96


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x), y)


def plan_of(mesh: tuple[int, int] = (2, 4), layers: int = 6) -> Plan:
    """A plan of alike layers, the batch over dp and each pair of products over tp."""
    grid = Layout(mesh, ("dp", "tp"))
    with torch.device("meta"):
        model, x, y = Model(layers), torch.empty(512, WIDTH), torch.empty(512, dtype=torch.long)
    parameters = {f"layers.{i}.up.weight": grid("tp", "None") for i in range(layers)}
    parameters |= {f"layers.{i}.down.weight": grid("None", "tp") for i in range(layers)}
    sw.shard(model, in_strategy=(grid("dp", "None"), grid("dp")), parameter_plan=parameters)
    return plan_for(mesh[0] * mesh[1], model, x, y, mode="semi_auto", machine="h100")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of()


@pytest.fixture(scope="module")
def data(plan: Plan) -> dict[str, Any]:
    return page_data(plan, "a model")


def data_in(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


# -- the data -------------------------------------------------------------------------------------------------------------


def test_alike_layers_are_written_once(plan, data):
    first, block = (item for item in data["tree"] if isinstance(item, dict) and item["names"] != ["head"])
    assert first["names"] == ["layers.0"]  # it adds to a tensor with no sum pending
    assert block["names"] == [f"layers.{i}" for i in range(1, 6)]
    assert [item["names"] for item in block["items"] if isinstance(item, dict)] == [["norm"], ["up"], ["down"]]
    assert len(data["kinds"]) <= 2 * block["length"] + 5
    assert {row["name"] for row in data["parameters"]} >= {"layers.*.norm.weight", "layers.*.up.weight", "head.bias"}
    assert sum(len(row["inputs"]) for row in data["parameters"]) == 6 * 4 + 2


def test_the_tree_has_every_node_once_in_order(plan, data):
    def walk(items, shift):
        for item in items:
            if isinstance(item, list):
                yield from range(item[0] + shift, item[1] + shift)
            else:
                for copy in range(len(item["names"])):
                    yield from walk(item["items"], shift + copy * item["length"])

    assert list(walk(data["tree"], 0)) == list(range(len(plan.graph.nodes)))


def test_times_add_up_to_the_price(plan, data):
    total = sum(move["seconds"] for move in data["returned"])
    for number in data["nodes"]["kinds"]:
        kind = data["kinds"][number]
        total += sum(kind.get("price", [])[:3])
        total += sum(move["seconds"] for move in [*kind.get("moves", ()), *kind.get("after", ())])
    total += sum(row["update"] * len(row["inputs"]) for row in data["parameters"])
    assert total == pytest.approx(plan.price.seconds, rel=1e-3)


def test_memory_over_time(plan, data):
    memory = data["memory"]
    assert sum(count for _, count in memory["phases"]) == len(memory["nodes"]) == len(plan.memory.points)
    highest = plan.memory.points.index(plan.memory.highest)
    parts = {name: of if isinstance(of, int) else of[highest] for name, of in memory["parts"].items()}
    assert sum(parts.values()) * memory["unit"] == pytest.approx(plan.memory.peak, rel=1e-3)


def test_the_peak_is_that_of_the_plan(plan, data):
    """Also where rounding makes several points equally high."""
    memory, parts = data["memory"], plan.memory.parts
    shown = {name: of if isinstance(of, int) else of[memory["highest"]] for name, of in memory["parts"].items()}
    for name, size in shown.items():
        assert size * memory["unit"] == pytest.approx(parts[name], abs=memory["unit"])
    assert memory["limit"] == 80e9  # of the machine, where none was asked for


def test_own_collectives_are_named(plan, data):
    found = 0
    for node, number in zip(plan.graph.nodes, data["nodes"]["kinds"]):
        kind, price = data["kinds"][number], plan.price.operators.get(node.name)
        own = kind.get("own", [[], []])
        assert [len(phase) for phase in own] == [len(phase) for phase in (price.own if price else ((), ()))]
        found += sum(map(len, own))
    assert found > 0


def test_the_page_holds_its_data_whatever_they_say(data):
    nasty = {**data, "title": "</script><script>alert(1)</script> & {{data}}", "notes": ["<!-- <script> \u2028 é ${x}"]}
    page = render(nasty)
    assert data_in(page) == json.loads(json.dumps(nasty))
    assert "<title>&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; {{data}}</title>" in page
    assert page.count("</script>") == 2


def test_the_page_fetches_nothing(data):
    page = render(data)
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page) == []
    assert "default-src 'none'" in page


def test_a_plan_without_a_price_shows_layouts(plan):
    data = page_data(plan, priced=False)
    assert data["step"] is data["memory"] is None
    assert {"price", "moves"}.isdisjoint(key for kind in data["kinds"] for key in kind)
    assert data["title"] == "Plan for 8 ranks"


def test_the_size_does_not_grow_with_ranks_and_hardly_with_layers(data):
    small = len(render(data))
    many_ranks = len(render(page_data(plan_of((128, 128)))))
    many_layers = len(render(page_data(plan_of(layers=60))))
    assert many_ranks < small + 1000
    assert many_layers < small + 54 * 2500


def test_ranks_are_written_as_runs():
    tables = Tables()
    tables.mesh(Mesh(("a",), (6,), (7, 5, 3, 4, 5 + 3, 12)))
    tables.mesh(Mesh(("a", "b"), (128, 128)))
    runs = [mesh["ranks"] for mesh in tables.rows["meshes"]]
    assert [[a + b * i for a, b, n in each for i in range(n)] for each in runs] == [[7, 5, 3, 4, 8, 12], list(range(16384))]
    assert len(runs[1]) == 1


@pytest.mark.parametrize(
    "modules, kinds, names",
    [
        (["0", "1", "2"], [1, 1, 2], [["0", "1"], ["2"]]),
        (["q", "k"], [1, 1], [["q"], ["k"]]),  # only numbered ones are folded
        (["m.layers.0.fc", "m.layers.1.fc"], [1, 1], [["m.layers.0", "m.layers.1"]]),
        (["a.b.c", "a.b"], [1, 2], [["a.b"]]),
        (["fc", "", "fc"], [1, 2, 1], [["fc"], None, ["fc"]]),  # entered again
        (["l.0.x", "l.0.y", "l.1.x", "l.1.z"], [1, 1, 1, 1], [["l.0"], ["l.1"]]),
        ([], [], []),
    ],
)
def test_modules_as_a_tree(modules, kinds, names):
    assert [item["names"] if isinstance(item, dict) else None for item in module_tree(modules, kinds)] == names


# -- in a browser ---------------------------------------------------------------------------------------------------------

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        assert not os.environ.get("SHARDWRIGHT_REQUIRE_BROWSER"), "no chromium or no chromedriver on the PATH"
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


class Page:
    """A page in the browser."""

    def __init__(self, driver: Any, path: Path):
        self.driver = driver
        driver.get_log("browser"), driver.get_log("performance")
        driver.get(path.as_uri())

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.one(selector).text)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Any) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda _: condition())

    def cells(self) -> dict[int, str]:
        """Rank and slice of every cell of the device grid."""
        return {int(c.get_attribute("data-rank")): c.get_attribute("data-slice") for c in self.all("#inspector [data-rank]")}

    def errors(self) -> list[Any]:
        return [entry for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [s["request"]["url"] for s in sent if s["documentURL"] == self.driver.current_url]  # not the browser's own


@pytest.fixture
def page(browser, plan, tmp_path) -> Iterator[Page]:
    path = tmp_path / "plan.html"
    write_page(plan, path, "a model")
    page = Page(browser, path)
    yield page
    assert page.errors() == []


def slices(layout: Layout, shape: tuple[int, ...]) -> dict[int, str]:
    """What each rank holds, as the page writes it."""
    return {rank: ",".join(f"{a}:{b}" for a, b in bounds) for rank, bounds in layout.bounds(shape).items()}


def test_it_opens_and_asks_for_nothing(page, plan):
    assert page.driver.title == "a model"
    assert f"{len(plan.graph.nodes)} operators" in page.text("#subtitle")
    assert "dp = 2" in page.text("#axes")
    assert page.requests() == [page.driver.current_url]
    assert page.text("#facts").startswith("a step takes")
    assert len(page.all("#hot li")) > 3


def test_a_module_opens_and_a_tensor_shows_which_rank_holds_what(page, plan):
    first, folded = page.all("details")[:2]
    assert "layers.1 … layers.5" in folded.text
    assert folded.get_attribute("open")  # it takes most of the time
    assert not first.get_attribute("open")
    first.find_element("css selector", "summary").click()
    node = next(n for n in plan.graph.nodes if n.module == "layers.0.up")
    page.wait(lambda: page.all(f'[data-node="{node.name}"]'))
    row = page.one(f'[data-node="{node.name}"]')
    weight = next(b for b in row.find_elements("css selector", ".tensors > .tensor") if b.text.startswith("weight"))
    weight.click()
    layout, shape = plan.choices[node.name].inputs[1], node.op.inputs[1].shape
    assert page.cells() == slices(layout, shape)
    assert page.text("#inspector h2") == "layers.0.up / linear · input 1"

    colours = {c.get_attribute("data-rank"): c.value_of_css_property("background-color") for c in page.all(".cell")}
    assert colours["1"] == colours["5"] != colours["2"]  # dp replicates

    box = page.one("#rank")
    box.clear()
    box.send_keys("6")
    assert page.text("#slice") == "[" + slices(layout, shape)[6].replace(",", ", ") + "]"
    assert len(page.all(".cell.lit")) == 2


def test_another_copy_of_alike_layers_can_be_shown(page, plan):
    node = next(n for n in plan.graph.nodes if n.module == "layers.4.down")
    page.run("document.querySelectorAll('details')[1].show(arguments[0])", plan.graph.nodes.index(node))
    assert page.one(f'[data-node="{node.name}"]').is_displayed()
    assert page.run("return document.querySelector('.copies select').value") == "layers.4"


def test_slices_of_all_kinds_of_layouts(page):
    grid = Layout((2, 3, 2), ("a", "b", "c"))
    mapped = Layout((2, 2), ("x", "y"), [5, 1, 7, 3])
    sized = Layout.of(grid.mesh, (("b",), ("a",)), (), ((5, 0, 2), None))
    cases = [
        (grid(("a", "b"), "c"), (13, 5)), (grid("c>a", "None"), (7, 3)), (grid("b", "a"), (2, 1)), (sized, (7, 3)),
        (grid(("a", "b", "c")), (5,)), (mapped("y", "x"), (9, 4)), (mapped("x>y"), (6,)), (Layout.replicated(grid.mesh, 0), ()),
    ]  # fmt: skip
    tables = Tables()
    asked = [(tables.layout(layout), shape, rank) for layout, shape in cases for rank in layout.mesh.ranks]
    script = """
        const before = [data.meshes, data.layouts];
        [data.meshes, data.layouts] = arguments;
        try { return arguments[2].map(([layout, shape, rank]) => holds(data.layouts[layout], shape, rank)); }
        finally { [data.meshes, data.layouts] = before; }"""
    found = page.run(script, tables.rows["meshes"], tables.rows["layouts"], asked)
    expected = [[list(b) for b in layout.bounds(shape)[rank]] for layout, shape in cases for rank in layout.mesh.ranks]
    assert found == expected


def test_a_large_mesh_shows_one_cell_a_piece_or_the_axes(browser, tmp_path):
    plan = plan_of((64, 8), 2)
    write_page(plan, tmp_path / "plan.html")
    page = Page(browser, tmp_path / "plan.html")
    node = next(n for n in plan.graph.nodes if n.module == "layers.0.up")
    page.run("reveal(arguments[0])", plan.graph.nodes.index(node))
    x, weight = page.all(f'[data-node="{node.name}"] .tensors > .tensor')[:2]
    weight.click()
    expected = slices(plan.choices[node.name].inputs[1], node.op.inputs[1].shape)
    assert page.cells() == {rank: expected[rank] for rank in range(8)}
    assert "64 ranks hold each" in page.text("#inspector")
    x.click()
    assert page.text("#slice") == "[0:8, 0:96]"
    page.run("const box = document.querySelector('#rank'); box.value = 510; box.dispatchEvent(new Event('input'))")
    expected = slices(plan.choices[node.name].inputs[0], node.op.inputs[0].shape)
    assert page.text("#slice").strip("[]").replace(" ", "") == expected[510]

    out = next(n for n in plan.graph.nodes if n.op.name == "aten.relu")
    page.run("reveal(arguments[0])", plan.graph.nodes.index(out))
    page.all(f'[data-node="{out.name}"] .tensors > .tensor')[0].click()
    assert page.cells() == {}
    assert {c.get_attribute("data-axis") for c in page.all("#inspector [data-axis]")} == {"dp", "tp"}
    assert page.errors() == []


def test_the_memory_chart_says_what_runs_there(page, plan):
    from selenium.webdriver import ActionChains

    chart = page.one("#chart")
    before = page.text("#moment")
    assert "(the peak)" in before
    ActionChains(page.driver).move_to_element_with_offset(chart, -150, 0).perform()
    page.wait(lambda: page.text("#moment") != before)
    assert "in the forward" in page.text("#moment")
    chart.send_keys("\ue014")  # the right arrow
    assert any(n.op.name.removeprefix("aten.") in page.text("#moment") for n in plan.graph.nodes)
    assert len(page.all("#chart path")) >= 3


def test_the_table_of_parameters_is_sorted(page, plan):
    def column(number: int) -> list[str]:
        return [cell.text for cell in page.all(f"#parameters tbody td:nth-child({number})")]

    head = page.all("#parameters th button")[0]
    head.click()
    assert column(1) == sorted(column(1))
    assert page.one("#parameters th").get_attribute("aria-sort") == "ascending"
    head.click()
    assert column(1) == sorted(column(1), reverse=True)
    page.all("#parameters th button")[3].click()
    assert column(1)[0] == "layers.{0…5}.up.weight"


def test_operators_are_found(page, plan):
    page.one("body").send_keys("/")
    box = page.one("#search")
    assert page.driver.switch_to.active_element == box
    box.send_keys("layers.3 LINEAR")
    page.wait(lambda: page.text("#found").startswith("2 of"))
    names = {row.get_attribute("data-node") for row in page.all("#tree .operator")}
    assert names == {n.name for n in plan.graph.nodes if n.module in ("layers.3.up", "layers.3.down")}
    box.clear()
    box.send_keys(" ")
    page.wait(lambda: page.text("#found") == "")


def test_an_operator_shows_what_it_costs(page, plan):
    page.all("#hot button")[0].click()
    assert "plan.explain(" in page.text("#inspector")
    assert len(page.all(".operator.selected")) == 1
    assert page.driver.switch_to.active_element.get_attribute("class").startswith("name")


def test_in_a_narrow_window_what_is_selected_comes_into_view(page):
    before = page.driver.get_window_size()
    page.driver.set_window_size(800, 700)
    try:
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        page.run("document.querySelector('#tree .tensor').click()")
        box = page.run("const b = document.querySelector('#inspector').getBoundingClientRect(); return [b.top, b.bottom]")
        assert 0 < box[0] < box[1] == pytest.approx(page.run("return innerHeight"), abs=1)
        page.one("#inspector .close").click()
        assert page.all(".selected, [aria-pressed=true]") == []
    finally:
        page.driver.set_window_size(before["width"], before["height"])


def test_what_is_moved_is_named(page):
    assert any(": backward all reduce" in row.text for row in page.all("#hot .what"))
    assert all(row.get_attribute("title") for row in page.all("#hot button"))


def test_dark_and_print(page):
    def background() -> str:
        return str(page.run("return getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    dark = background()
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert len({light, dark, background()}) == 3
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_a_page_without_a_price(browser, plan, tmp_path):
    write_page(plan, tmp_path / "plan.html", priced=False)
    page = Page(browser, tmp_path / "plan.html")
    assert not page.one("#hot").is_displayed()
    assert not page.one("#memory").is_displayed()
    page.run("reveal(0)")
    page.one(".operator.selected .tensor").click()
    assert len(page.cells()) == 8
    page.run("reveal(arguments[0])", next(i for i, n in enumerate(plan.graph.nodes) if n.module == "layers.0.norm") + 4)
    assert page.text(".operator.selected .move").endswith("dp,None +sum(tp) → dp,None")
    assert page.errors() == []


def test_one_rank(browser, tmp_path):
    write_page(plan_for(1, nn.Linear(4, 4, device="meta"), torch.empty(2, 4, device="meta")), tmp_path / "plan.html")
    page = Page(browser, tmp_path / "plan.html")
    page.one("#tree .tensor").click()
    assert page.cells() == {0: "0:2,0:4"}
    assert page.errors() == []
