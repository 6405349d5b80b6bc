// Sorting, copying, enlarging: comfort only; everything can be read without it.
'use strict';

for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const before = head.getAttribute('aria-sort');
      const first = head.dataset.first || 'descending';
      const second = first === 'descending' ? 'ascending' : 'descending';
      const next = before === first ? second : before === second ? '' : first;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      if (!next) return body.append(...original);
      head.setAttribute('aria-sort', next);
      const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      const compare = (one, other) => {
        const [a, b] = [value(one), value(other)];
        if (a === '' || b === '') return (a === '') - (b === '');  // cells without a value come last, either way
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return next === 'ascending' ? order : -order;
      };
      body.append(...[...original].sort(compare));
    });
  });
}

for (const button of document.querySelectorAll('button.copy')) {
  button.hidden = false;
  button.addEventListener('click', async () => {
    const source = document.getElementById(button.dataset.from);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = 'Copied';
    } catch {  // a page from a file may not write to the clipboard: select the text instead
      getSelection().selectAllChildren(source);
      button.textContent = 'Selected: press Ctrl+C';
    }
    setTimeout(() => { button.textContent = 'Copy'; }, 3000);
  });
}

const dialog = document.getElementById('enlarged');
for (const button of document.querySelectorAll('button.enlarge')) {
  button.addEventListener('click', () => {
    const copy = button.firstElementChild.cloneNode(true);
    for (const one of copy.querySelectorAll('[id]')) one.removeAttribute('id');
    dialog.querySelector('div').replaceChildren(copy);
    dialog.showModal();
  });
}
dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
