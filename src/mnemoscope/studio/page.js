// Runs once for each part of the page: clicks on its buttons become events, and what is replaced keeps the reader's place.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-do]");
  if (button) trigger("act", { ...button.dataset });
});

element.addEventListener("submit", (event) => {
  const form = event.target.closest("form[data-do]");
  if (!form) return;
  event.preventDefault();
  trigger("act", { ...form.dataset, text: new FormData(form).get("text") });
});

element.addEventListener("change", async (event) => {
  const input = event.target;
  if (input.type !== "file" || !input.files.length) return;
  const file = input.files[0];
  input.value = "";
  if (file.size > Number(input.dataset.largest)) return trigger("act", { do: "large", name: file.name });
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  trigger("act", { do: "open", name: file.name, data: btoa(text) });
});

let focused; // what asked for the reader's attention last

watch("value", () => {
  // A picture that takes the place of another one must not be uncovered because that one was.
  for (const box of element.querySelectorAll(".reveal")) {
    if (box.shows !== box.dataset.key) box.checked = false;
    box.shows = box.dataset.key;
  }
  for (const input of element.querySelectorAll("input[name=text]")) input.value = "";
  const next = element.querySelector("[data-focus]");
  if (next && next.dataset.focus !== focused) next.focus({ preventScroll: false });
  focused = next?.dataset.focus;
  // The address is the link, so that loading the page again shows the same.
  const link = element.querySelector("a.permalink");
  if (link) history.replaceState(null, "", link.getAttribute("href"));
});
