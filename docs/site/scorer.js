// How search results are ordered: pages before names of the library, guides and results first.
var Scorer = {
  score: ([page, , , , score, , kind]) => score - (kind === "object" ? 30 : 0) + (page.startsWith("docs/") ? 5 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
