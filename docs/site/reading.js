/* What the theme leaves out for those who read by keyboard or by ear. */
const mend = () => {
  document.querySelectorAll("nav.md-code__nav").forEach((buttons, index) => {
    buttons.ariaLabel ??= `Code ${index + 1}`;
  });
  for (const wide of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) {
    wide.tabIndex = 0;
    wide.role = "group";
    wide.ariaLabel = "Table";
  }
};

mend();
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
