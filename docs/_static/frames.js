// Frames of results are as tall as the pages in them, which say how tall they are.
addEventListener("message", ({ data, source }) => {
  if (!data || !data.tensorlens) return;
  for (const frame of document.querySelectorAll("iframe[srcdoc]"))
    if (frame.contentWindow === source) frame.style.height = `${Math.min(2400, data.tensorlens + 4)}px`;
});
