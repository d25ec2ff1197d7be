// Search results say what a name of the library is; pictures open in full size; commands wrap between words.
async function addSummary(result) {
  const link = result.querySelector("a");
  if (result.querySelector("p") || !link?.hash) return;
  const page = new DOMParser().parseFromString(await (await fetch(link.href)).text(), "text/html");
  const name = page.getElementById(decodeURIComponent(link.hash.slice(1)));
  const about = (name?.nextElementSibling ?? name)?.querySelector("p");
  if (!about || result.querySelector("p")) return;
  const summary = document.createElement("p");
  summary.className = "context";
  summary.textContent = about.textContent;
  result.append(summary);
}

function enlarge(picture) {
  const link = document.createElement("a");
  link.href = picture.src;
  link.title = "Full size";
  picture.replaceWith(link);
  link.append(picture);
}

function keepWords(command) {
  const walker = document.createTreeWalker(command, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts) {
    text.replaceWith(...text.data.split(/(\s+)/).map(word => {
      if (!word.trim()) return word;
      const kept = document.createElement("span");
      kept.className = "word";
      kept.textContent = word;
      return kept;
    }));
  }
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".bd-article p > img").forEach(enlarge);
  document.querySelectorAll(".highlight-sh pre").forEach(keepWords);
  const results = document.querySelector("#search-results");
  if (!results) return;
  new MutationObserver(() => results.querySelectorAll("li.kind-object:not([data-seen])").forEach(result => {
    result.dataset.seen = "";
    addSummary(result);
  })).observe(results, {childList: true, subtree: true});
});
