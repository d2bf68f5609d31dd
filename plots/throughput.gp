# Tokens per second of whole models: a panel per model, each on its own scale from zero; published
# numbers as outlines beside our bars.
#
# gnuplot -e "format='png'; output='x.png'; data='x.gp'; name='Throughput'" FILE

load data
load "plots/style.gp"

n = words(labels)
m = words(published_labels)
panels = words(models)
set multiplot title sprintf("%s: %s\n%s%s", name, shape, device, \
    m > 0 ? " (outlines: published)" : "") noenhanced
set key off
set grid noxtics
set yrange [0:*]
set offsets 0, 0, graph 0.3, 0
set xrange [0.4:n + 0.6]
set boxwidth 0.38
set format y "%.0f"
set xtics ("" 0)
set for [i = 1:n] xtics add (word(labels, i) i)
set xtics rotate by 40 right noenhanced scale 0
set tmargin at screen 0.78
set bmargin at screen 0.22

# Ours stand left of the middle where anything is published; and where a published series stands.
ours = m > 0 ? -0.2 : 0
place(s) = (sum [k = 1:n] (word(labels, k) eq s ? k : 0)) + 0.2
bar(value, model) = int(model) == panel ? value : NaN
number(value) = sprintf("%.0f", value)

bars = 'for [i = 1:n] $data index i - 1 using (i + ours):(bar($2, $1)) with boxes \
        fillstyle solid linecolor rgb colour(word(labels, i)), \
        for [i = 1:n] $data index i - 1 using (i + ours):(bar($2, $1)):(number($2)) with labels \
        left rotate by 90 offset 0, 0.4 font ",12"'
outlines = 'for [i = 1:m] $published index i - 1 \
            using (place(word(published_labels, i))):(bar($2, $1)) with boxes \
            fillstyle empty linecolor rgb colour(word(published_labels, i)), \
            for [i = 1:m] $published index i - 1 \
            using (place(word(published_labels, i))):(bar($2, $1)):(number($2)) with labels \
            left rotate by 90 offset 0, 0.4 font ",12" textcolor rgb "#777777"'
left(panel) = 0.11 + 0.87 * (panel - 1) / panels
do for [panel = 1:panels] {
	set lmargin at screen left(panel)
	set rmargin at screen left(panel + 1) - (panels > 1 ? 0.08 : 0)
	set title word(models, panel) noenhanced
	set ylabel (panel == 1 ? "tokens/s" : "")
	if (m > 0) {
		plot @bars, @outlines
	} else {
		plot @bars
	}
}
unset multiplot
