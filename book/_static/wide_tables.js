// A table wider than the page scrolls. While there is more to the right, its container is marked, and book.css fades it.
function mark(container) {
  const more = container.scrollWidth - container.clientWidth - container.scrollLeft > 1;
  container.toggleAttribute("data-more", more);
}

document.addEventListener("DOMContentLoaded", () => {
  const watcher = new ResizeObserver((entries) => entries.forEach((entry) => mark(entry.target)));
  for (const container of document.querySelectorAll(".pst-scrollable-table-container")) {
    container.addEventListener("scroll", () => mark(container), { passive: true });
    watcher.observe(container);
  }
});
