"use strict";
// Makes every widget of the page from its data. A block of its own: the charts' script shares the page.
{
  const makers = {
/* makers */
  };
  const given = JSON.parse(document.getElementById("widget-data").textContent);
  for (const root of document.querySelectorAll("[data-widget]")) {
    try {
      makers[root.dataset.maker](root, given[Number(root.dataset.widget)]);
      root.dataset.state = "ready";
    } catch (error) {
      root.dataset.state = "failed";
      root.textContent = `This part of the page could not be made: ${error.message}`;
    }
  }
}
