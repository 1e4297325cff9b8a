/** What the widgets say, in the page's language: locales/<language>/main.json under "semanticDiffusion". */

let texts = {};

/** Take the texts of this language from what the server has of all of them; English where one is missing. */
export function speak(all, language) {
  texts = { ...all?.en?.semanticDiffusion, ...all?.[language]?.semanticDiffusion };
}

/** The text of this name, with %name in it replaced by values.name. */
export function say(name, values = {}) {
  return (texts[name] ?? name).replace(/%(\w+)/g, (whole, key) => values[key] ?? whole);
}
