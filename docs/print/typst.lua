-- What pandoc's Typst writer does not do by itself: alternative text for formulas (PDF/UA asks for it), page
-- numbers after links inside the book, code that may break, quotation marks that open and close.

local function quoted(s)
  local escapes = {["\\"] = "\\\\", ['"'] = '\\"', ["\n"] = "\\n", ["\t"] = "\\t", ["\r"] = ""}
  return '"' .. s:gsub('[\\"\n\t\r]', escapes) .. '"'
end

local function raw(s) return pandoc.RawInline("typst", s) end

-- Pair the double quotation marks of a paragraph; with an odd number of them, leave them straight.
local function curl(block)
  if not pandoc.utils.stringify(block.content):find("[\"']") then return nil end
  local count, seen = 0, 0
  block:walk{Str = function(el) count = count + select(2, el.text:gsub('"', "")) end}
  return block:walk{Str = function(el)
    local text = el.text:gsub("^'s$", "’s"):gsub("^'s(%W)", "’s%1"):gsub("(%w)'", "%1’")
    text = text:gsub("^([(\"]?)'(%w)", "%1‘%2"):gsub("'", "’")
    if count % 2 == 0 then
      text = text:gsub('"', function() seen = seen + 1; return seen % 2 == 1 and "“" or "”" end)
    end
    return pandoc.Str(text)
  end}
end

local quotes = {Para = curl, Plain = curl}

-- Symbols that pandoc still calls by names that Typst has dropped.
local renamed = {["sect"] = "inter", ["times%.circle"] = "times.o", ["dot%.circle"] = "dot.o",
                 ["minus%.circle"] = "minus.o", ["bracket%.l%.double"] = "bracket.l.stroked",
                 ["bracket%.r%.double"] = "bracket.r.stroked"}

local function formula(el)
  local display = el.mathtype == "DisplayMath"
  local body = pandoc.write(pandoc.Pandoc{pandoc.Plain{el}}, "typst"):gsub("%s+$", "")
  for old, new in pairs(renamed) do body = body:gsub("%f[%a]" .. old .. "%f[^%a]", new) end
  body = body:gsub("#h%(0em%)", "thick")  -- what pandoc makes of \\;
  body = body:gsub("\\| ([^|,()]-) \\|", "abs(%1)")  -- |A|: bars that belong together
  local name = display and "#display-formula(" or "#formula("
  return raw(name .. quoted(el.text) .. ", " .. body .. ");")
end

local function link(el)
  local place = el.target:match("^#(.+)$")
  local open = place and "#xref(" .. quoted(place) .. ")[" or "#outside(" .. quoted(el.target) .. ")["
  local parts = pandoc.List{raw(open)}
  parts:extend(el.content)
  parts:insert(raw("];"))
  return parts
end

local function html(el)
  if not el.format:match("html") then return nil end
  if el.text:match("^<br") then return pandoc.LineBreak() end
  local name = el.text:match("^</?([%w]+)")
  local known = {b = 1, i = 1, em = 1, strong = 1, sub = 1, sup = 1, details = 1, summary = 1, p = 1, div = 1,
                 span = 1, a = 1, img = 1, kbd = 1, pre = 1}
  if name == nil or known[name] then return {} end
  return raw("#c(" .. quoted(el.text) .. ");")
end

local shape = {
  Math = formula,
  Link = link,
  RawInline = html,
  RawBlock = function(el) if el.format:match("html") then return {} end end,
  Code = function(el) return raw("#c(" .. quoted(el.text) .. ");") end,
  CodeBlock = function(el)
    return pandoc.RawBlock("typst", "#fenced(" .. quoted(el.classes[1] or "") .. ", " .. quoted(el.text) .. ")")
  end,
  Image = function(el) return pandoc.Emph(el.caption) end,
  Header = function(el) return pandoc.Para{pandoc.Strong(el.content)} end,
  Table = function(el)
    for i, spec in ipairs(el.colspecs) do el.colspecs[i] = {spec[1], nil} end
    return el
  end,
}

return {quotes, shape}
