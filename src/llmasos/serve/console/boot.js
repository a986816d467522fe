/* Before the first paint: the theme that was chosen. A plain script, as modules run too late for that. */
try {
  const theme = JSON.parse(localStorage.getItem("llmasos.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // nothing is kept here
}
