// Sets the colour scheme before the first paint. "auto" follows the system; the choice is kept on
// this machine only. A classic script, because modules run after the page is drawn.
(function () {
  const KEY = "driftgate-theme";
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => localStorage.getItem(KEY) || "auto";
  const apply = () => {
    const dark = chosen() === "dark" || (chosen() === "auto" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    window.dispatchEvent(new Event("driftgate-theme"));
  };
  system.addEventListener("change", apply);
  window.driftgateTheme = {
    chosen,
    choose(value) {
      localStorage.setItem(KEY, value);
      apply();
    },
  };
  apply();
})();
