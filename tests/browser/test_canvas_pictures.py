"""What the canvas widget is drawn on, and the colours of the pack's sockets, on the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from .conftest import Artist

pytestmark = pytest.mark.browser

RED, GREEN, BLUE = (230, 20, 20), (20, 200, 40), (20, 60, 230)
# Adds nodes as {name: [class, {widget: value}]} and links as [from, output, to, input]; the canvas is the last node's.
BUILD = """([nodes, links]) => {
    const made = Object.fromEntries(Object.entries(nodes).map(([name, [type, values]], at) => {
        const node = LiteGraph.createNode(type);
        node.pos = [-400 * (Object.keys(nodes).length - 1 - at), 0];
        app.graph.add(node);
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find(widget => widget.name === name);
            widget.value = value;
            widget.callback?.(value);
        }
        window.added = node;
        return [name, node];
    }));
    for (const [from, slot, to, name] of links) {
        made[from].connect(slot, made[to], made[to].inputs.findIndex(input => input.name === name));
    }
}"""


def upload(artist: Artist, name: str, picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    file = {"name": name, "mimeType": "image/png", "buffer": data.getvalue()}
    assert artist.page.request.post(f"{artist.desk.url}/upload/image", multipart={"image": file, "overwrite": "true"}).ok
    return name


def halves(left: tuple, right: tuple, mode: str = "RGB") -> Image.Image:
    picture = Image.new(mode, (128, 128), left)
    picture.paste(right, (64, 0, 128, 128))
    return picture


def build(artist: Artist, nodes: dict, links: list) -> None:
    artist.page.evaluate(BUILD, [nodes, links])
    artist.settle()


def encoded(name: str, file: str) -> tuple[dict, list]:
    """The nodes and links from an image file to an embedding, which is the first output of the node of this name."""
    nodes = {f"{name} image": ["LoadImage", {"image": file}], f"{name} features": ["SDAEncodeImage", {}], name: ["SDABuildEmbedding", {}]}
    return nodes, [[f"{name} image", 0, f"{name} features", "image"], [f"{name} features", 0, name, "features"]]


def is_near(colour: list[int], expected: tuple) -> bool:
    return all(abs(one - other) < 40 for one, other in zip(colour, expected))


def soon(artist: Artist, place: tuple[float, float], expected: tuple) -> None:
    """The canvas shows this colour there, once the pictures have come."""
    for _ in range(100):
        if is_near(found := artist.colour(*place), expected):
            return
    raise AssertionError(f"{found} at {place}, not {expected}")


def dimmed(colour: tuple) -> tuple:
    return tuple(0.55 * value for value in colour)


def test_the_picture_above_is_drawn(artist: Artist) -> None:
    nodes, links = encoded("source", upload(artist, "canvas_red.png", Image.new("RGB", (128, 128), RED)))
    build(artist, {**nodes, "strength": ["SDAStrength", {}]}, [*links, ["source", 0, "strength", "embedding"]])
    soon(artist, (0.9, 0.9), RED)


def test_the_image_of_the_boxes_is_drawn_before_any_above(artist: Artist) -> None:
    nodes, links = encoded("source", upload(artist, "canvas_red.png", Image.new("RGB", (128, 128), RED)))
    image = {"image": ["LoadImage", {"image": upload(artist, "canvas_halves.png", halves(BLUE, GREEN))}]}
    links += [["source", 0, "region", "embedding"], ["image", 0, "region", "image"]]
    build(artist, {**nodes, **image, "region": ["SDARegionalPrompt", {}]}, links)
    soon(artist, (0.1, 0.1), dimmed(BLUE))


@pytest.mark.parametrize(("kind", "left", "right"), [("SDACompose", GREEN, GREEN), ("SDAPlace", BLUE, GREEN)])
def test_the_other_picture_is_drawn_where_it_will_appear(kind: str, left: tuple, right: tuple, artist: Artist) -> None:
    first, links = encoded("first", upload(artist, "canvas_red.png", Image.new("RGB", (128, 128), RED)))
    second, more = encoded("second", upload(artist, "canvas_halves.png", halves(BLUE, GREEN)))
    into = {"joined": [kind, {"x": 0.5, "y": 0.5, "width": 0.5, "height": 0.5}]}
    links = [*links, *more, ["first", 0, "joined", "embedding"], ["second", 0, "joined", "other"]]
    build(artist, first | second | into, links)
    soon(artist, (0.2, 0.2), dimmed(RED))
    soon(artist, (0.6, 0.7), left)
    soon(artist, (0.9, 0.7), right)


def test_an_other_without_a_picture_does_not_look_like_the_first(artist: Artist) -> None:
    first, links = encoded("first", upload(artist, "canvas_red.png", Image.new("RGB", (128, 128), RED)))
    build(artist, {**first, "joined": ["SDACompose", {}]}, [*links, ["first", 0, "joined", "embedding"]])
    soon(artist, (0.2, 0.2), dimmed(RED))
    assert not is_near(artist.colour(0.8, 0.45), RED)


def test_a_picture_is_found_through_a_node_that_was_met_for_something_else(artist: Artist, miniature: object) -> None:
    """Regional prompts take the loader's CLIP, and its picture reaches them through an embedding."""
    nodes = {
        "miniature": ["SDALoadMiniature", {}],
        "shown": ["PreviewImage", {}],
        "features": ["SDAEncodeImage", {}],
        "source": ["SDABuildEmbedding", {}],
        "first": ["SDARegionalPrompt", {}],
        "second": ["SDARegionalPrompt", {}],
    }
    links = [["miniature", 7, "shown", "images"], ["miniature", 7, "features", "image"], ["features", 0, "source", "features"]]
    for name, embedding in (("first", "source"), ("second", "first")):
        links += [["miniature", 1, name, "clip"], [embedding, 0, name, "embedding"]]
    build(artist, nodes, links)
    plain = artist.colour(0.4, 0.45)
    artist.page.evaluate("app.queuePrompt(0)")  # the picture alone can run: the rest lacks encoders and shows nothing
    artist.desk.until("app.graph.nodes.some(node => node.type === 'PreviewImage' && app.nodeOutputs[node.id]?.images?.length)", True)
    for _ in range(50):
        if max(abs(one - other) for one, other in zip(artist.colour(0.4, 0.45), plain)) > 30:
            break
    else:
        raise AssertionError("the picture is not drawn")


def test_a_mask_is_drawn_and_the_box_is_not(artist: Artist, miniature: object) -> None:
    mask = upload(artist, "canvas_mask.png", halves((0, 0, 0), (255, 255, 255)))
    # A text of its own in either renderer: what a run has cached it does not tell again.
    prompt = "a red circle" if artist.desk.modern else "a blue circle"
    nodes = {
        "miniature": ["SDALoadMiniature", {}],
        "mask": ["LoadImageMask", {"image": mask, "channel": "red"}],
        "seen": ["SDAPreviewEmbedding", {}],
        "region": ["SDARegionalPrompt", {"text": prompt, "x": 0.05, "y": 0.05, "width": 0.3, "height": 0.3}],
    }
    links = [["miniature", 1, "region", "clip"], ["mask", 0, "region", "mask"], ["region", 0, "seen", "embedding"]]
    build(artist, nodes, links)
    artist.page.evaluate("app.graph.nodes.forEach(node => { if (node.type === 'SDAPreviewEmbedding') node.pos = [400, 0]; })")
    assert artist.says() == "The connected mask or boxes are the region; a run shows it."
    corner, left, right = (0.15, 0.15), (0.35, 0.6), (0.85, 0.6)
    soon(artist, corner, artist.colour(*left))
    artist.desk.run()
    status = "document.querySelector('.sda-editor [role=status]').textContent"
    artist.desk.until(status, "The connected mask or boxes are the region, as in the last run.")
    assert is_near(artist.colour(*corner), artist.colour(*left))
    assert sum(artist.colour(*right)) > 1.3 * sum(artist.colour(*left))


def test_inside_a_mask_the_other_picture_is_drawn(artist: Artist) -> None:
    first, links = encoded("first", upload(artist, "canvas_red.png", Image.new("RGB", (128, 128), RED)))
    second, more = encoded("second", upload(artist, "canvas_halves.png", halves(BLUE, GREEN)))
    stencil = upload(artist, "canvas_stencil.png", halves((255, 255, 255, 0), (255, 255, 255, 255), "RGBA"))
    into = {"mask": ["SolidMask", {}], "joined": ["SDACompose", {"x": 0.0, "y": 0.0, "width": 0.3, "height": 0.3}]}
    links = [*links, *more, ["first", 0, "joined", "embedding"], ["second", 0, "joined", "other"], ["mask", 0, "joined", "mask"]]
    build(artist, first | second | into, links)
    soon(artist, (0.15, 0.15), RED)  # neither the box nor the mask, of which nobody knows yet
    file = f"{{ filename: '{stencil}', subfolder: '', type: 'input' }}"
    artist.page.evaluate(f"added.onExecuted({{ box: [0.5, 0, 1, 1], mask: [{file}] }})")
    soon(artist, (0.8, 0.6), GREEN)
    soon(artist, (0.15, 0.15), dimmed(RED))


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_sockets_have_colours(palette: str, artist: Artist, nodes: dict) -> None:
    page = artist.page
    # Shows a socket of every type of the pack, and reads what the page draws it with: in Nodes 2.0 the dot, else the palette.
    script = """modern => Object.fromEntries(app.graph.nodes.flatMap(node => [...node.inputs, ...node.outputs].map(({ type }) => type))
        .filter(type => String(type).startsWith('SDA_')).map(type => {
            const dot = document.querySelector(`[style*="color-datatype-${type})"], [style*="color-datatype-${type},"]`);
            const painted = dot && getComputedStyle(dot).backgroundColor;
            const hex = painted && '#' + painted.match(/\\d+/g).slice(0, 3).map(n => Number(n).toString(16).padStart(2, '0')).join('');
            const { canvas } = app;
            const link = canvas.constructor.link_type_colors[type];
            return [type, modern ? [hex, link] : [canvas.default_connection_color_byType[type], link]];
        }))"""
    types = {t for node in nodes.values() for t in node["output"] if isinstance(t, str) and t.startswith("SDA_")}
    loaders = ["SDALoadVisionEncoders", "SDALoadAdapter", "SDALoadEditDecoder", "SDAEncodeImage", "SDABuildEmbedding"]
    page.evaluate(BUILD, [{kind: [kind, {}] for kind in loaders}, []])
    artist.desk.fit()
    try:
        page.evaluate("name => app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
        page.wait_for_timeout(1000)
        found = page.evaluate(script, artist.desk.modern)
        assert set(found) == types
        hexadecimal = """colour => {
            const ctx = document.createElement('canvas').getContext('2d');
            ctx.fillStyle = colour;
            return ctx.fillStyle;
        }"""
        grounds = page.evaluate(f"[LiteGraph.NODE_DEFAULT_BGCOLOR, app.canvas.clear_background_color].map({hexadecimal})")
        for type, (socket, link) in found.items():
            assert socket == link, type
            for ground in grounds:
                light, dark = sorted((luminance(socket), luminance(ground)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 2.5, (type, socket, ground)
        assert len({link for _, link in found.values()}) == len(types)
    finally:
        page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
        page.wait_for_timeout(500)
